"""The state machine of every change to what is served: add, remove, swap, roll back.

A change walks through a table of steps. Each has a state that operators see, a limit of time, and
what undoes it. Until ``commit`` (the names move, or the slot is gone) any failure undoes the steps
so far, last to first, and what served goes on serving. After it the change stands; only a variant
whose golden answers changed when the engine was compacted is taken out again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from liveprune.patches.live_types import Served
from liveprune.pruning.errors import EngineError, LiveprunError, StoreError
from liveprune.server.change import Change
from liveprune.server.operations import Operation, State
from liveprune.server.registry import Phase, Registry
from liveprune.server.state_folder import SavedState
from liveprune.server.swap_steps import Steps

T = TypeVar("T")

LIMITS: Mapping[State, float] = {
    State.QUEUED: 60,
    State.MAKING_ROOM: 600,  # until long requests let go of their KV blocks
    State.FILLING: 3600,
    State.PUBLISHING: 60,
    State.CANARY: 300,
    State.SCORING: 600,  # of one candidate, behind all that users ask
    State.SWITCHING: 60,
    State.DRAINING: 600,  # until the streams on the old variant end
    State.RELEASING: 300,
    State.GROWING: 600,
}
"""Seconds in each state; also for its undoing."""


@dataclass(frozen=True)
class Step:
    """One state of an operation: what is done in it, and what undoes that, done or half done.

    A step that commits does so in its last act.
    """

    state: State
    run: Callable[[Steps, Change], Awaitable[None]]
    undo: Callable[[Steps, Change], Awaitable[None]] | None = None


MAKE_LIVE = (
    Step(State.QUEUED, Steps.store),
    Step(State.MAKING_ROOM, Steps.make_room, Steps.give_room_back),
    Step(State.FILLING, Steps.fill, Steps.stop_filling),
    Step(State.PUBLISHING, Steps.publish, Steps.unpublish),
)
TRY_OUT = (
    Step(State.QUEUED, Steps.store),
    # Room is given back once, after the last candidate: the next one needs as much.
    Step(State.MAKING_ROOM, Steps.make_room),
    *MAKE_LIVE[2:],
)
MOVE_NAMES = (
    Step(State.CANARY, Steps.canary),
    Step(State.SWITCHING, Steps.switch, Steps.save_again),  # commits
)
TAKE_OUT = (Step(State.DRAINING, Steps.drain, Steps.stop_draining),)  # commits
TIDY_UP = (
    Step(State.RELEASING, Steps.release),
    Step(State.GROWING, Steps.grow),
)
CHECK = (Step(State.CANARY, Steps.canary_compacted),)
FORGET = (Step(State.RELEASING, Steps.forget, Steps.save_again),)  # commits

logger = logging.getLogger("liveprune.swap")


def bring(change: Change) -> tuple[Step, ...]:
    """Make ``change.variant`` live if it is not, move the names, take ``change.old`` out."""
    first = () if change.new else MAKE_LIVE
    last = (*TAKE_OUT, *TIDY_UP, *CHECK) if change.old else TIDY_UP
    return (*first, *MOVE_NAMES, *last)


def take_out(change: Change, *, forget: bool) -> tuple[Step, ...]:
    """Take ``change.old`` out if there is one, and forget ``change.variant`` if asked to."""
    return (*((*TAKE_OUT, *TIDY_UP) if change.old else ()), *(FORGET if forget else ()))


def tidy_up(registry: Registry) -> tuple[Step, ...]:
    """Where there is nothing else to do: take out what an earlier operation could not."""
    return TIDY_UP if any(p.phase is Phase.LEFTOVER for p in registry.publications) else ()


class Swapper:
    """Walks changes through their tables, one at a time."""

    def __init__(self, steps: Steps, limits: Mapping[State, float]) -> None:
        self._steps = steps
        self._registry = steps.registry
        self._limits = limits
        self._entered = 0.0

    async def run(self, change: Change, table: Sequence[Step]) -> None:
        """Carry a change out to its end; never raises, the operation says what became of it."""
        operation, before = change.operation, self._registry.saved()
        self._entered = time.monotonic()
        try:
            await self._walk(change, table)
            if change.mismatch is not None:
                await self._go_back(change, before)
        except asyncio.CancelledError:
            if change.cancel_asked:
                operation.notes.append(self._verdict(change, "cancelled"))
                end = State.CANCELLED
            else:
                operation.error = self._verdict(change, "interrupted: the server stopped")
                end = State.FAILED
        except Exception as error:  # whatever it was, it was undone and is reported
            operation.error = self._verdict(change, _reason(error))
            end = State.FAILED
            on_purpose = isinstance(error, LiveprunError | OSError)
            logger.warning("%s: %s", operation.variant, operation.error, exc_info=not on_purpose)
        else:
            end = State.DONE
        try:
            await uninterrupted(self._steps.tidy(change))
        except (OSError, StoreError) as error:
            operation.notes.append(f"files of a plan that is not needed stay: {error}")
        self._enter(operation, end)
        operation.finished = time.time()

    async def try_out(self, change: Change, work: Callable[[Served], Coroutine[Any, Any, T]]) -> T:
        """Make a candidate live under no name, work with it, and take it out again.

        Raises:
            LiveprunError: it could not be made live, or the work failed: then the operation is
                ``scoring``. ``change.undone`` says if it is out again; the next operation tries
                again if not.
        """
        self._entered = time.monotonic()
        found: list[T] = []

        async def run(_: Steps, change: Change) -> None:
            found.append(await work(change.coming.served))

        try:
            for step in (*(() if change.new else TRY_OUT), Step(State.SCORING, run)):
                await self._take(change, step)
        finally:
            await uninterrupted(self._undo(change))
            await uninterrupted(self._steps.tidy(change))
        return found[0]

    async def _walk(self, change: Change, table: Sequence[Step]) -> None:
        try:
            for step in table:
                await self._take(change, step)
        except (Exception, asyncio.CancelledError):
            await uninterrupted(self._undo(change))
            raise

    async def _take(self, change: Change, step: Step) -> None:
        self._enter(change.operation, step.state)
        if step.undo is not None:
            change.undo.append((step.state, partial(step.undo, self._steps)))
        limit = self._limits[step.state]
        try:
            async with asyncio.timeout(limit) as timer:
                await step.run(self._steps, change)
        except asyncio.CancelledError:
            if not (change.cancel_asked and change.committed):
                raise
            change.operation.notes.append("cancelled too late: it was committed at that moment")
        except TimeoutError as error:
            if not timer.expired():
                raise
            running = self._registry.in_flight(change.old) if change.old else 0
            rest = f" ({running} requests still run)" if step.state is State.DRAINING else ""
            raise EngineError(f"{step.state} took longer than {limit:g} s{rest}") from error

    async def _undo(self, change: Change) -> None:
        """Undo what was begun, last to first; what fails is noted and tried again later."""
        for state, undo in reversed(change.undo):
            try:
                async with asyncio.timeout(self._limits[state]):
                    await undo(change)
            except Exception as error:  # noqa: BLE001 - the other steps must be undone all the same
                change.undone = False
                change.operation.notes.append(f"not undone: {state}: {_reason(error)}")
        change.undo.clear()
        new = change.new
        if new is not None and new.phase is Phase.PREPARING:
            (self._registry.drop if change.undone else self._registry.leave)(new)

    async def _go_back(self, change: Change, before: SavedState) -> None:
        """Make the old variant serve again, and take out the one that answers differently now.

        Raises:
            EngineError: always; it says how far that went.
        """
        old, new = change.going, change.coming
        reason = f"{new.served.name}: golden answers changed by compaction: {change.mismatch}"
        change.operation.notes.append(f"{reason}; going back to {old.served.name}")
        back = Change(
            change.operation, old.variant, alias=before.alias, previous=before.previous, old=new
        )
        try:
            await self._walk(back, bring(back))
        except Exception as error:
            if new.phase is Phase.LIVE and back.committed:
                self._registry.leave(new)  # nobody shall ask for it, though it could not be drained
            raise EngineError(f"{reason}; and going back: {_reason(error)}") from error
        if back.mismatch is not None:
            reason = f"{reason}; {old.served.name} also differs: {back.mismatch}"
        raise EngineError(reason)

    def _enter(self, operation: Operation, state: State) -> None:
        now = time.monotonic()
        spent = operation.seconds.get(operation.state.value, 0.0)
        operation.seconds[operation.state.value] = spent + now - self._entered
        self._entered = now
        operation.state = state
        logger.info("%s of %s: %s", operation.kind, operation.variant, state)

    def _verdict(self, change: Change, reason: str) -> str:
        """One line: why it ended, and what serves now."""
        registry = self._registry
        serving = f"{registry.full_name(registry.alias)} serves {registry.name}"
        if not change.committed:
            outcome = "nothing has changed" if change.undone else "not all could be undone"
            return f"{reason}; {outcome}: {serving}"
        old = change.old
        if old is not None and old in registry.publications:
            return f"{reason}; {serving}, {old.served.name} still holds its slot and rows"
        if change.operation.state is State.CANARY:  # after the last step that changes anything
            return f"{reason}; {serving}"
        return f"{reason}; {serving}, rows may be left over until the next operation"


async def uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work`` to its end, whoever wants to cancel meanwhile."""
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise
        except Exception:  # noqa: BLE001, S110 - raised below
            pass
    task.result()


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, LiveprunError) and text:
        return text
    return f"{type(error).__name__}: {text}"
