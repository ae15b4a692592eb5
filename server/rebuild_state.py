"""What a server in rebuild mode remembers over restarts, its own ones included.

``rebuild.json`` in the state folder says which pruned checkpoints there are (``rebuilt/DIGEST``),
which of them was the last that answered (``serving``), which one the next start is to try
(``wanted``), and whether a start with it is under way (``attempt``). Only a server that answers
becomes ``serving``: whatever dies before that, by whatever means, leaves the one before in place.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import VariantError
from liveprune.pruning.files import write_atomic
from liveprune.server.operations import Operation, State
from liveprune.server.saved_form import base_fingerprint, read_form
from liveprune.server.variant import FULL

VERSION = 1
STATE_FILE = "rebuild.json"
CHECKPOINTS = "rebuilt"


@dataclass(frozen=True)
class Built:
    """A pruned checkpoint that is complete."""

    digest: str
    """Of its plan; also the name of its folder."""
    experts: Mapping[str, int]
    """``{"min", "max", "total"}`` kept over the layers."""
    top_k: Mapping[str, int]
    """``{"min", "max"}`` over the layers."""
    bytes: int
    """On disk."""


@dataclass(frozen=True)
class RebuildState:
    """What ``rebuild.json`` holds beside the model that it is for."""

    variants: Mapping[str, Built] = field(default_factory=dict)
    """By tag; ``full`` needs no mention."""
    serving: str = FULL
    """Tag of the checkpoint that answered last."""
    previous: str | None = None
    """Tag that a roll-back returns to."""
    wanted: str | None = None
    """Tag that a swap under way is to serve."""
    attempt: bool = False
    """A start with ``wanted`` is under way."""
    stopping: float = 0.0
    """When the swap under way stopped the server, seconds since 1970."""
    start_seconds: float = 0.0
    """From the start of the process to the first answer, at the last start that answered."""
    operation: Mapping[str, Any] | None = None
    """The last swap or roll-back, as ``Operation.to_json`` writes it."""
    key: str | None = None
    """Its idempotency key."""

    def switching(self, tag: str, operation: Operation, key: str | None) -> RebuildState:
        """The server stops so that the next start tries ``tag``."""
        return replace(
            self,
            wanted=tag,
            attempt=False,
            stopping=time.time(),
            operation=operation.to_json(),
            key=key,
        )

    def attempting(self) -> RebuildState:
        """A start with ``wanted`` begins."""
        return replace(self, attempt=True)

    def staying(self) -> RebuildState:
        """The server could not be stopped for the swap, and serves on."""
        return replace(self, wanted=None, operation=None, key=None)

    def failed(self, reason: str) -> RebuildState:
        """Nothing more is tried; the operation ends when ``serving`` answers again."""
        operation = None if self.operation is None else {**self.operation, "error": reason}
        return replace(self, wanted=None, attempt=False, operation=operation)

    def answered(self, start_seconds: float) -> RebuildState:
        """The server of this start has answered for the first time: what it serves is settled."""
        state, succeeded = replace(self, start_seconds=start_seconds), False
        if self.attempt and self.wanted is not None:
            succeeded = True
            state = replace(
                state, serving=self.wanted, previous=self.serving, wanted=None, attempt=False
            )
        operation = self.last_operation()
        if operation is None or operation.state.ended:
            return state
        down = time.time() - self.stopping
        operation.state = State.DONE if succeeded else State.FAILED
        operation.finished = time.time()
        operation.seconds[State.SWITCHING.value] = down
        operation.notes.append(
            f"{state.serving!r} answered {down:.1f} s after the server was told to stop"
        )
        return replace(state, operation=operation.to_json())

    def last_operation(self) -> Operation | None:
        """The last swap or roll-back, which may have begun before the restart."""
        if self.operation is None:
            return None
        form = dict(self.operation)
        progress = form.pop("progress")
        return Operation(
            **{**form, "state": State(form["state"]), "error": form["error"] or ""},
            bytes_done=progress["bytes_done"],
            bytes_total=progress["bytes_total"],
        )


class RebuildFolder:
    """The part of a state folder that rebuild mode uses.

    Whoever opens it holds the folder's lock (an open ``StateFolder``).
    """

    def __init__(self, path: Path, base: Path) -> None:
        """Read ``path`` for the checkpoint ``base``; writes nothing.

        Raises:
            CheckpointError: its state is damaged, of an unknown version, or of another base model.
        """
        self.path = path
        self.base = base
        self.opened = time.monotonic()
        """When this process began, seconds of the monotonic clock."""
        self.answering = threading.Event()
        """The server of this process has answered, whether or not that could be recorded."""
        self._base = base_fingerprint(base)
        self._writing = threading.Lock()
        self.state = self._read()

    @property
    def state_file(self) -> Path:
        """Where the state is."""
        return self.path / STATE_FILE

    @property
    def checkpoints(self) -> Path:
        """Where pruned checkpoints are written."""
        return self.path / CHECKPOINTS

    def model(self, tag: str) -> Path:
        """The checkpoint's folder of a variant.

        Raises:
            VariantError: there is no such variant.
        """
        if tag == FULL:
            return self.base
        if tag not in self.state.variants:
            known = ", ".join(sorted({FULL, *self.state.variants}))
            raise VariantError(f"variant {tag!r} is unknown, expected one of {known}")
        return self.checkpoints / self.state.variants[tag].digest

    def update(self, change: Callable[[RebuildState], RebuildState]) -> RebuildState:
        """Change the state on disk, then here; the old one stays if writing fails.

        Callable from any thread: changes never mix.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        with self._writing:
            state = change(self.state)
            form = {"version": VERSION, "base": self._base, **asdict(state)}
            write_atomic(self.state_file, (json.dumps(form, indent=1) + "\n").encode())
            self.state = state
            return state

    def _read(self) -> RebuildState:
        return read_form(self.state_file, VERSION, self._base, _state_of) or RebuildState()


def _state_of(form: dict[str, Any]) -> RebuildState:
    """Parse strictly: whatever ``update`` would not have written raises."""
    variants = {tag: Built(**built) for tag, built in form.pop("variants").items()}
    for built in variants.values():
        if len(built.digest) != 32:
            raise ValueError(f"found {built.digest!r}, expected a plan digest")
        bytes.fromhex(built.digest)  # it becomes a path
    state = RebuildState(variants, **form)
    for tag in (state.serving, state.previous, state.wanted):
        if tag is not None and tag != FULL and tag not in variants:
            raise ValueError(f"found {tag!r}, expected the tag of a variant")
    state.last_operation()
    return state
