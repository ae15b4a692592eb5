"""Operations from request to end: one at a time, in the background, kept for a while."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from liveprune.pruning.errors import ConflictError, VariantError
from liveprune.server.change import Change
from liveprune.server.operations import Operation, State
from liveprune.server.swap import Step, Swapper

logger = logging.getLogger("liveprune")

KEPT = 200
"""Operations that can still be asked for."""

T = TypeVar("T")

Asked = tuple[object, ...]
"""What a request asks for: an idempotency key must not come back with anything else."""


class OperationRunner:
    """Accepts changes, runs them, remembers their operations."""

    def __init__(
        self, swapper: Swapper, on_end: Callable[[Operation], None] = lambda _: None
    ) -> None:
        """``on_end`` is told of each operation that has ended; evaluations are none."""
        self._swapper = swapper
        self._on_end = on_end
        self._operations: dict[str, Operation] = {}
        self._keys: dict[str, tuple[Asked, Operation]] = {}
        self._current: tuple[Change, asyncio.Task[Any]] | None = None
        self._evaluation: asyncio.Task[Any] | None = None
        self.stopped = False
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """Ended operations by kind and final state, for metrics."""

    @property
    def current(self) -> Operation | None:
        """The operation under way."""
        return self._current[0].operation if self._current else None

    @property
    def busy(self) -> bool:
        """An operation is under way."""
        return self._current is not None

    def earlier(self, key: str | None, asked: Asked) -> Operation | None:
        """The operation that an idempotency key began; None if it is new.

        Raises:
            ConflictError: the key began something else.
        """
        if key is None or key not in self._keys:
            return None
        before, operation = self._keys[key]
        if before != asked:
            raise ConflictError(
                f"idempotency key {key!r}: came with {asked}, expected {before} as before"
            )
        return operation

    def check_free(self) -> None:
        """Raise ConflictError while an operation is under way, and after ``stop``."""
        if self.stopped:
            raise ConflictError("the server is stopping")
        if (busy := self.current) is not None:
            raise ConflictError(
                f"operation {busy.id} is under way: {busy.kind} of {busy.variant}, {busy.state}; "
                "wait for it or cancel it"
            )

    def begin(
        self, change: Change, table: Sequence[Step], key: str | None = None, asked: Asked = ()
    ) -> Operation:
        """Start a change in the background; without steps there is nothing to do, and it is done.

        Raises:
            ConflictError: another one is under way, or ``key`` began something else.
        """
        if (earlier := self.earlier(key, asked)) is not None:
            return earlier
        self.check_free()
        operation = change.operation
        logger.info("%s %s begins (%s)", operation.kind, operation.variant, operation.id)
        self._operations[operation.id] = operation
        if key is not None:
            self._keys[key] = (asked, operation)
        if table:
            task = asyncio.create_task(self._swapper.run(change, table))
            self._current = change, task
            task.add_done_callback(lambda _: self._ended(change))
        else:
            operation.notes.append("nothing to do")
            operation.state, operation.finished = State.DONE, time.time()
            self._ended(change)
        return operation

    async def evaluate(self, change: Change, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` in the place of an operation, which gives way to any other.

        It ends when ``work`` does, whoever stops waiting for it, and is not remembered: searches
        have many.

        Raises:
            ConflictError: an operation is under way, or this one was interrupted for one.
        """
        try:
            self.check_free()
        except ConflictError:
            work.close()
            raise
        operation = change.operation
        self._operations[operation.id] = operation
        task = asyncio.create_task(work)
        self._current, self._evaluation = (change, task), task
        task.add_done_callback(lambda _: self._evaluated(operation))
        await asyncio.wait({task})
        if task.cancelled():
            raise ConflictError(
                f"{operation.kind}: interrupted, by an operation on the variants or an operator; "
                "try again"
            )
        return task.result()

    async def make_way(self) -> None:
        """Interrupt an evaluation if one runs, and wait until it has tidied up."""
        while (task := self._evaluation) is not None:
            task.cancel()
            await asyncio.wait({task})

    async def idle(self) -> None:
        """Wait for the end of the operation under way."""
        if self._current is not None:
            await asyncio.wait({self._current[1]})

    async def stop(self, seconds: float) -> None:
        """Begin nothing more, interrupt what is under way, and give its undoing some seconds."""
        self.stopped = True
        if self._current is not None:
            task = self._current[1]
            task.cancel()
            await asyncio.wait({task}, timeout=seconds)

    def operation(self, operation_id: str) -> Operation:
        """One operation.

        Raises:
            VariantError: it is unknown, or ended long ago.
        """
        found = self._operations.get(operation_id)
        if found is None:
            raise VariantError(f"operation {operation_id!r} is unknown, or ended long ago")
        return found

    def operations(self) -> list[Operation]:
        """The newest first."""
        return list(reversed(self._operations.values()))

    def cancel(self, operation_id: str) -> Operation:
        """Have an operation undone; it is over when its state says so.

        Raises:
            VariantError: it is unknown.
            ConflictError: it has ended, or gone past the point where it can be undone.
        """
        operation = self.operation(operation_id)
        if self._current is None or self._current[0].operation is not operation:
            raise ConflictError(f"operation {operation.id} has ended: {operation.state}")
        change, task = self._current
        if change.committed or operation.state is State.SWITCHING:
            raise ConflictError(
                f"operation {operation.id} is {operation.state}, too late to cancel; roll back"
            )
        change.cancel_asked = True
        task.cancel()
        return operation

    def _evaluated(self, operation: Operation) -> None:
        del self._operations[operation.id]
        self._current = self._evaluation = None

    def _ended(self, change: Change) -> None:
        operation = change.operation
        if not operation.state.ended:  # cancelled before its first step
            operation.notes.append("cancelled before it began")
            operation.state, operation.finished = State.CANCELLED, time.time()
        self.outcomes[operation.kind, operation.state.value] += 1
        if operation.state is not State.FAILED:  # failures are logged where they happen
            notes = ", ".join(operation.notes)
            text = f"{operation.kind} {operation.variant}: {operation.state} {notes}".rstrip()
            logger.info("%s (%s)", text, operation.id)
        self._current = None
        self._on_end(operation)
        for old in list(self._operations)[:-KEPT]:
            del self._operations[old]
        self._keys = {k: v for k, v in self._keys.items() if v[1].id in self._operations}
