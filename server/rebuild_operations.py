"""Operations of rebuild mode: one at a time, in the background; a swap outlives its process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from liveprune.pruning.errors import ConflictError, LiveprunError, VariantError
from liveprune.server.operations import Operation, State

KEPT = 200
"""Operations that can still be asked for."""

Asked = tuple[str, ...]
"""What a request asks for: an idempotency key must not come back with anything else."""
Work = Callable[[Operation], Coroutine[Any, Any, None]]

logger = logging.getLogger("liveprune.rebuild")


class RebuildOperations:
    """Accepts operations, runs them, remembers them."""

    def __init__(self, on_end: Callable[[Operation], None]) -> None:
        self._on_end = on_end
        self._operations: dict[str, Operation] = {}
        self._keys: dict[str, tuple[Asked, str]] = {}
        """What was asked for with an idempotency key, and the id of the operation."""
        self._current: Operation | None = None
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False
        self._entered = 0.0

    @property
    def current(self) -> Operation | None:
        """The operation under way; a swap is until the server has been restarted."""
        return self._current

    def remember(self, operation: Operation, key: str | None, asked: Asked) -> None:
        """Take over an operation that is under way since before this restart."""
        self._operations[operation.id] = self._current = operation
        if key is not None:
            self._keys[key] = (asked, operation.id)

    def settle(self, outcome: Operation | None) -> None:
        """End the operation that was taken over, if one was, as ``outcome`` says."""
        if self._current is not None and outcome is not None:
            self._operations[outcome.id] = outcome
            self._on_end(outcome)
        self._current = None

    def earlier(self, key: str | None, asked: Asked) -> Operation | None:
        """The operation that an idempotency key began; None if it is new.

        Raises:
            ConflictError: the key began something else.
        """
        if key is None or key not in self._keys:
            return None
        before, operation_id = self._keys[key]
        if before != asked:
            raise ConflictError(
                f"idempotency key {key!r}: came with {asked}, expected {before} as before"
            )
        return self._operations[operation_id]

    def check_free(self) -> None:
        """Raise ConflictError while an operation is under way."""
        if (busy := self._current) is not None:
            raise ConflictError(
                f"{busy.kind} of {busy.variant} is under way ({busy.state}, operation {busy.id}); "
                "wait for its end, or cancel it"
            )

    def begin(self, operation: Operation, work: Work, key: str | None, asked: Asked) -> Operation:
        """Run ``work`` in the background; what it raises becomes the operation's error.

        Work that ends while the operation is switching leaves it so: a restart ends it.
        """
        self._operations[operation.id] = operation
        if key is not None:
            self._keys[key] = (asked, operation.id)
        for old in list(self._operations)[:-KEPT]:
            del self._operations[old]
        self._keys = {k: v for k, v in self._keys.items() if v[1] in self._operations}
        self._current, self._cancelled, self._entered = operation, False, time.monotonic()
        self._task = asyncio.create_task(work(operation))
        self._task.add_done_callback(partial(self._ended, operation))
        return operation

    def enter(self, operation: Operation, state: State) -> None:
        """Move an operation on, and book the time that it was in the state before."""
        now = time.monotonic()
        operation.seconds[operation.state.value] = now - self._entered
        self._entered = now
        operation.state = state
        logger.info("%s of %s: %s", operation.kind, operation.variant, state)

    async def cancel(self, operation_id: str) -> Operation:
        """Give up an operation; returns when it has ended.

        Raises:
            VariantError: it is unknown.
            ConflictError: it has ended, or its restart has begun.
        """
        operation = self._operations.get(operation_id)
        if operation is None:
            raise VariantError(f"operation {operation_id!r} is unknown, or ended long ago")
        if operation.state.ended:
            raise ConflictError(f"operation {operation.id} has ended: {operation.state}")
        if operation.state is State.SWITCHING or self._task is None:
            raise ConflictError(
                f"operation {operation.id} is {operation.state}, too late to cancel; roll back"
            )
        self._cancelled = True
        self._task.cancel()
        await asyncio.wait({self._task})
        return operation

    async def stop(self) -> None:
        """Interrupt what is under way, but for a swap that has stopped the server itself."""
        task = self._task
        if task is not None and self._current is not None:
            if self._current.state is not State.SWITCHING:
                task.cancel()
            await asyncio.wait({task})

    def operation(self, operation_id: str) -> Operation | None:
        """One operation, also some time after its end."""
        return self._operations.get(operation_id)

    def operations(self) -> list[Operation]:
        """The newest first."""
        return list(reversed(self._operations.values()))

    def _ended(self, operation: Operation, task: asyncio.Task[None]) -> None:
        end = State.DONE
        if task.cancelled():
            end = State.CANCELLED if self._cancelled else State.FAILED
            operation.error = "" if self._cancelled else "interrupted: the server stopped"
        elif (error := task.exception()) is not None:
            text = " ".join(str(error).split())
            known = isinstance(error, LiveprunError) and text
            operation.error = text if known else f"{type(error).__name__}: {text}"
            end = State.FAILED
        elif operation.state is State.SWITCHING:
            return
        self.enter(operation, end)
        operation.finished = time.time()
        self._current = None
        self._on_end(operation)
