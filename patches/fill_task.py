"""One run of the row filler: its threads, its phases and its end."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from liveprune.patches.background_thread import in_background
from liveprune.patches.layer_fill import LayerFill, Work
from liveprune.patches.live_types import FillProgress
from liveprune.patches.row_writer import RowWriter
from liveprune.pruning.errors import EngineError, LiveprunError

if TYPE_CHECKING:
    from liveprune.patches.row_filler import RowFiller


class _CancelledError(Exception):
    """Someone called ``FillTask.cancel``."""


class FillTask:
    """The handle of a task; ``RowFiller.start`` makes it."""

    def __init__(self, filler: RowFiller, layers: Sequence[LayerFill]) -> None:
        self._filler = filler
        self._layers = layers
        self._writers = [RowWriter(filler.reader) for _ in range(filler.threads)]
        self._cancelled = threading.Event()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._progress = FillProgress("filling")

    @property
    def running(self) -> bool:
        """Not over: filling, verifying, or waiting for its turn."""
        return not self._over.is_set()

    @property
    def cancelled(self) -> bool:
        """``cancel`` was called, perhaps too late."""
        return self._cancelled.is_set()

    def progress(self) -> FillProgress:
        """Where it is; bytes are those of rows to write, temporary ones included."""
        return self._progress

    def cancel(self) -> None:
        """Ask it to end, which is at most one expert's work away; does not wait.

        A task that is just becoming ready stays so: ``wait`` and look at the phase.
        """
        self._cancelled.set()
        self._filler.wake()

    def wait(self, timeout: float | None = None) -> FillProgress:
        """Wait until it is over, or for ``timeout`` seconds; returns the progress."""
        self._over.wait(timeout)
        return self._progress

    def claims(self, layer: int) -> frozenset[int]:
        """Rows of a layer that it relies on until it is over."""
        return frozenset().union(*(x.wanted | x.sources for x in self._layers if x.layer == layer))

    def begin(self) -> None:
        """Start its first thread; once.

        Raises:
            EngineError: the system has no thread to give.
        """
        # A thread that Python stops while it computes can take the process down with it.
        atexit.register(self._end)
        try:
            threading.Thread(target=self._run, name="liveprune-fill", daemon=True).start()
        except RuntimeError as error:
            atexit.unregister(self._end)
            raise EngineError(f"fill: no thread to be had: {error}") from error

    def _end(self) -> None:
        self.cancel()
        self._over.wait()

    def _run(self) -> None:
        phase, error = "ready", ""
        try:
            self._carry_out()
        except _CancelledError:
            phase = "cancelled"
        except Exception as caught:  # noqa: BLE001 - whatever it was, the caller must learn of it
            phase, error = "failed", one_line(caught)
        if phase != "ready":
            for layer in self._layers:
                try:
                    layer.undo()
                except Exception as caught:  # noqa: BLE001 - as above; the other layers go on
                    phase, error = "failed", f"{error} (and: {one_line(caught)})".strip()
        self._writers.clear()
        self._show(phase, error=error)
        atexit.unregister(self._end)
        self._filler.leave(self, self._over)

    def _carry_out(self) -> None:
        self._filler.await_turn(self)
        self._check_cancelled()
        with self._filler.protect():
            self._show("filling", bytes_total=sum(layer.plan() for layer in self._layers))
        plain = [layer for layer in self._layers if not layer.merged]
        for layer in plain:
            layer.commit()
        self._share([work for layer in plain for work in layer.filling()])
        for layer in self._layers:
            if layer.merged:
                layer.commit()
                self._share(layer.filling())
                self._share(layer.merging())
                self._share(layer.recording())
                layer.release_temporary()
        self._show("verifying")
        self._share([work for layer in self._layers for work in layer.verifying()])
        self._check_cancelled()

    def _share(self, work: Sequence[Work]) -> None:
        """Do all of it, on all threads; ends soon after the first error, and raises it."""
        items, errors = iter(work), list[Exception]()
        helpers = [
            threading.Thread(
                target=self._drain, args=(items, errors, writer), name="liveprune-fill", daemon=True
            )
            for writer in self._writers[1 : len(work)]
        ]
        try:
            for helper in helpers:
                helper.start()
            self._drain(items, errors, self._writers[0])
        except RuntimeError as error:  # no more threads to be had
            errors.append(error)
        for helper in helpers:
            if helper.ident is not None:
                helper.join()
        if errors:
            raise errors[0]

    def _drain(self, items: Iterator[Work], errors: list[Exception], writer: RowWriter) -> None:
        """Do items until there are none. Threads share the list's iterator: each gets its own."""
        try:
            with in_background(self._filler.device):
                for work in items:
                    if errors:
                        return
                    self._check_cancelled()
                    self._do(work, writer)
        except Exception as error:  # noqa: BLE001 - raised again by ``_share``
            errors.append(error)

    def _do(self, work: Work, writer: RowWriter) -> None:
        try:
            written = work.run(writer)
            if self._filler.device.type == "cuda":
                torch.cuda.current_stream(self._filler.device).synchronize()
        except Exception as error:
            raise EngineError(f"{work.name}: {one_line(error)}") from error
        with self._lock:
            done = self._progress.bytes_done + written
            self._progress = replace(self._progress, bytes_done=done)

    def _show(self, phase: str, **fields: Any) -> None:
        with self._lock:
            self._progress = replace(self._progress, phase=phase, **fields)

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise _CancelledError


def one_line(error: Exception) -> str:
    """What went wrong, for a status line; errors that are not ours with their type."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, LiveprunError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
