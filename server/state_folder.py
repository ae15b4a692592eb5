"""The folder in which a server remembers its variants over restarts.

``state.json`` says which variants there are, which were live and what the alias served;
``plans/DIGEST.json`` holds their plans and ``golden/`` their golden answers; ``candidates/`` is
empty but while plans of a search are tried out. Files appear whole or
not at all, and one server uses the folder at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import ConflictError, PlanError
from liveprune.pruning.files import write_atomic
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_io import load_plan, save_plan
from liveprune.server.saved_form import base_fingerprint, read_form
from liveprune.server.variant import FULL, check_tag

VERSION = 1
STATE_FILE = "state.json"
_BASE_GOLDEN = "base"


@dataclass(frozen=True)
class SavedState:
    """What ``state.json`` holds beside the model that it is for."""

    variants: Mapping[str, str] = field(default_factory=dict)
    """Tag to plan digest; ``full`` needs no mention."""
    live: tuple[str, ...] = (FULL,)
    """Tags that answered requests."""
    alias: str = FULL
    """Tag that the bare name routed to."""
    previous: str | None = None
    """Tag that a roll-back returns to."""
    published: int = 0
    """Publications so far: the greatest epoch given out."""


class StateFolder:
    """An opened state folder; ``close`` lets another server have it."""

    def __init__(self, path: Path, base: Path) -> None:
        """Open ``path``, made with mode 0700 if it is not there, for the checkpoint ``base``.

        Raises:
            ConflictError: another server uses it.
            CheckpointError: its state is damaged, of an unknown version, or of another base model.
            OSError: it cannot be made, read or locked.
        """
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._writing = threading.Lock()
        self._lock: int | None = _lock(path)
        try:
            for folder in ("plans", "golden", "candidates"):
                (path / folder).mkdir(mode=0o700, exist_ok=True)
            for left in (path / "candidates").iterdir():  # by a server that was killed
                left.unlink()
            self._base = base_fingerprint(base)
            self.state = self._read()
            """The last state saved; that of a fresh server if there is none."""
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save(self, state: SavedState) -> None:
        """Write ``state.json``: the old one stays if this fails. Callable from any thread.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        form = {"version": VERSION, "base": self._base, **asdict(state)}
        with self._writing:
            write_atomic(self.path / STATE_FILE, (json.dumps(form, indent=1) + "\n").encode())
            self.state = state

    def plan_path(self, digest: str) -> Path:
        """Where the plan with this digest is, in our own form."""
        return self.path / "plans" / f"{digest}.json"

    def candidate_path(self, digest: str) -> Path:
        """Where a plan is while it is tried out."""
        return self.path / "candidates" / f"{digest}.json"

    def store_plan(self, plan: Plan) -> None:
        """Write a plan; one that is there already is written again, which mends it.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        save_plan(plan, self.plan_path(plan.digest))

    def load_plan(self, digest: str) -> Plan:
        """Read a stored plan.

        Raises:
            PlanError: it is missing, damaged, or not the one that its name promises.
        """
        path = self.plan_path(digest)
        plan = load_plan(path)
        if plan.digest != digest:
            raise PlanError(f"{path}: holds the plan {plan.digest}, expected {digest}")
        return plan

    def golden_path(self, digest: str | None, key: str) -> Path:
        """Where the golden answers of a plan (None: the base model) are; ``key``: the engine's."""
        return self.path / "golden" / f"{digest or _BASE_GOLDEN}-{key}.json"

    def discard(self, digest: str) -> None:
        """Delete a plan and its golden answers, unless a saved variant has it."""
        if digest in self.state.variants.values():
            return
        path = self.plan_path(digest)
        for file in (path, path.with_suffix(".safetensors")):
            file.unlink(missing_ok=True)
        for file in (self.path / "golden").glob(f"{digest}-*.json"):
            file.unlink(missing_ok=True)

    def _read(self) -> SavedState:
        path = self.path / STATE_FILE
        return read_form(path, VERSION, self._base, _state_of) or SavedState()


def _state_of(form: dict[str, Any]) -> SavedState:
    """Parse strictly: whatever ``save`` would not have written raises."""
    variants = dict(form["variants"])
    for tag, digest in variants.items():
        check_tag(tag)
        _expect(digest, isinstance(digest, str) and len(digest) == 32, "a plan digest")
        bytes.fromhex(digest)
    tags = {FULL, *variants}
    live, alias, previous = tuple(form["live"]), form["alias"], form["previous"]
    for tag in live:
        _expect(tag, tag in tags, "the tag of a variant")
    _expect(alias, alias in live, "a live tag as the alias")
    _expect(previous, previous is None or previous in tags, "the tag of a variant as previous")
    published = form["published"]
    _expect(published, type(published) is int and published >= 0, "a count of publications")
    return SavedState(variants, live, alias, previous, published)


def _expect(value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"found {value!r}, expected {expected}")


def _lock(path: Path) -> int:
    handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
    except BlockingIOError:
        holder = os.read(handle, 20).decode("ascii", "replace").strip()
        os.close(handle)
        raise ConflictError(
            f"{path}: used by another server (process {holder or 'unknown'}); expected a state "
            "folder of this server's own"
        ) from None
    except BaseException:
        os.close(handle)
        raise
    return handle
