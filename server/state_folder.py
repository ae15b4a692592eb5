"""The folder in which a server remembers its variants over restarts.

The store (``server.store``) says which variants there are, which were live and what the alias
served; ``plans/DIGEST.json`` holds their plans and ``golden/`` their golden answers;
``candidates/`` is empty but while plans of a search are tried out. Files appear whole or not at
all, and one server uses the folder at a time.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import ConflictError
from liveprune.pruning.plan import Plan
from liveprune.server.saved_form import base_fingerprint, parse_form, read_form
from liveprune.server.store.store import KEEP_JOBS, Store
from liveprune.server.variant import FULL, check_tag

VERSION = 1
OLD_FILE = "state.json"
"""Where releases before the store kept the state; taken over once."""
_BASE_GOLDEN = "base"


@dataclass(frozen=True)
class SavedState:
    """What the store holds of one server."""

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
    """An opened state folder; ``close`` lets another server have it.

    Attributes:
        store: opened with it.
        state: the last one saved; that of a fresh server if there is none.
    """

    def __init__(
        self,
        path: Path,
        base: Path,
        *,
        model: str | None = None,
        store_url: str | None = None,
        files: Path | None = None,
        replica: str | None = None,
        quota: int = 0,
        keep_jobs: int = KEEP_JOBS,
    ) -> None:
        """Open ``path``, made with mode 0700 if it is not there, for the checkpoint ``base``.

        Args:
            path: the folder.
            base: the base model's.
            model: its fingerprint; None: of its config alone.
            store_url: see ``Store``.
            files: folder of the store's files for all models; None: this one.
            replica: see ``Store``.
            quota: see ``Store``.
            keep_jobs: see ``Store``.

        Raises:
            ConflictError: another server uses it.
            CheckpointError: its state is damaged, of an unknown version, or of another base model.
            StoreError: the database is not usable.
            OSError: it cannot be made, read or locked.
        """
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._writing = threading.Lock()
        self._lock: int | None = _lock(path)
        try:
            for folder in ("golden", "candidates"):
                (path / folder).mkdir(mode=0o700, exist_ok=True)
            for left in (path / "candidates").iterdir():  # by a server that was killed
                left.unlink()
            before = base_fingerprint(base)
            known = model or before["config"]
            self._base = {**before, "fingerprint": known}
            shared = path if files is None else files / known
            self._own_store = store_url is None
            self.store = Store(
                shared,
                known,
                url=store_url,
                replica=replica,
                quota=quota,
                keep_jobs=keep_jobs,
            )
            self.store.drop_old_jobs()
            self._sizes: dict[str, int] = {}
            self._saved: dict[str, str] = {}
            self._take_over(before)
            self.state = self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the store, and unlock the folder."""
        if self._lock is not None:
            if hasattr(self, "store"):
                self.store.close()
            os.close(self._lock)
            self._lock = None

    def save(self, state: SavedState) -> None:
        """Write the state: the old one stays if this fails. Callable from any thread.

        Raises:
            StoreError: the disk is full, or the database cannot be written to.
            ConflictError: a variant is to be forgotten that another replica serves.
        """
        form = {key: x for key, x in asdict(state).items() if key != "variants"}
        with self._writing:
            self.store.servers.save(
                {"version": VERSION, "base": self._base, **form, "live": list(state.live)},
                variants=state.variants,
                before=self._saved,
                sizes=self._sizes,
            )
            self.state, self._saved = state, dict(state.variants)

    def refresh(self) -> Mapping[str, str]:
        """Tag to digest as it is now: other replicas and jobs publish variants, too.

        Raises:
            StoreError: the database cannot be read.
        """
        with self._writing:
            found = {tag: x.digest for tag, x in self.store.variants.all().items()}
            self._saved = dict(found)
            return found

    def store_plan(self, plan: Plan) -> None:
        """Write a plan; one that is there already is written again, which mends it.

        Raises:
            StoreError: the quota is used up.
            OSError: the disk is full, or the folder cannot be written to.
        """
        self.store.check_room()
        self._sizes[plan.digest] = self.store.plans.save(plan)

    def candidate_path(self, digest: str) -> Path:
        """Where a plan is while it is tried out."""
        return self.path / "candidates" / f"{digest}.json"

    def golden_path(self, digest: str | None, key: str) -> Path:
        """Where the golden answers of a plan (None: the base model) are; ``key``: the engine's."""
        return self.path / "golden" / f"{digest or _BASE_GOLDEN}-{key}.json"

    def discard(self, digest: str) -> None:
        """Delete a plan and its golden answers, unless a known variant has it.

        Raises:
            StoreError: the database failed; the files stay.
        """
        if digest in self.state.variants.values() or not self.store.variants.drop_plan(digest):
            return
        self.store.plans.discard(digest)
        for file in (self.path / "golden").glob(f"{digest}-*.json"):
            file.unlink(missing_ok=True)

    def _take_over(self, base: Mapping[str, str]) -> None:
        """Move the state of a release before the store into it, once."""
        path = self.path / OLD_FILE
        state = read_form(path, VERSION, base, _state_of)
        if state is not None:
            self.save(state)
            path.rename(path.with_name(f"{OLD_FILE}.imported"))

    def _read(self) -> SavedState:
        variants = {tag: x.digest for tag, x in self.store.variants.all().items()}
        self._saved = dict(variants)
        form, where = self.store.servers.read(), f"store of {self.path}"
        if form is None and self._own_store:
            # Of a model that was here before: its golden answers and plans are not this one's.
            form = next(iter(self.store.servers.of_other_models()), None)
        if form is None:
            return SavedState(variants)
        return parse_form(where, {**form, "variants": variants}, VERSION, self._base, _state_of)


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


@contextmanager
def locked(path: Path, *, needed: bool) -> Iterator[None]:
    """Keep servers from using a state folder; without ``needed`` nothing is done.

    Raises:
        ConflictError: a server uses it.
    """
    handle = _lock(path) if needed else None
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


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
