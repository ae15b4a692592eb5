"""The plans of one call, shared out in chunks: who does what, what is lost, who is to blame."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from liveprune.pruning.errors import EngineError, LiveprunError
from liveprune.pruning.plan import Plan

DEATHS = 2
"""Workers that died with a plan: so many are no accident."""


@dataclass(frozen=True)
class Chunk:
    """Plans that are asked for together, by their places in the call."""

    start: int
    stop: int
    lost_on: int | None = None
    """The worker that died with it."""


class Work:
    """Chunks wait, are taken, come back answered, refused or lost.

    Results go by the plans' places: who answered, and in which order, does not show.
    """

    def __init__(self, plans: Sequence[Plan | None], workers: int, least: int = 1) -> None:
        """Cut the plans into chunks for so many workers, of ``least`` plans or more."""
        self._plans = plans
        self._waiting = deque(_chunks(len(plans), workers, least))
        self._running = 0
        self._results: list[Any] = [None] * len(plans)
        self._died: defaultdict[int, list[int]] = defaultdict(list)
        """Workers that died with the plan of a place."""
        self._errors: dict[int, LiveprunError] = {}

    @property
    def finished(self) -> bool:
        """Nobody is at work, and nobody is to be."""
        return not self._running and (bool(self._errors) or not self._waiting)

    def take(self, worker: int, others: Collection[int]) -> Chunk | None:
        """The next chunk for a worker, None if there is none.

        One that a worker has died with goes to another, if ``others`` has any: the machine may
        be at fault. After an error the call fails as a whole, and nothing more is begun.
        """
        if self._errors:
            return None
        for chunk in self._waiting:
            if chunk.lost_on != worker or not others:
                self._waiting.remove(chunk)
                self._running += 1
                return chunk
        return None

    def answer(self, chunk: Chunk, results: Sequence[Any]) -> None:
        self._running -= 1
        self._results[chunk.start : chunk.stop] = results

    def refuse(self, chunk: Chunk, error: LiveprunError) -> None:
        """The engine is well, but some plan of the chunk cannot be run."""
        self._running -= 1
        self._errors[chunk.start] = error

    def lose(self, chunk: Chunk, worker: int, cause: str) -> list[int]:
        """The worker died with the chunk: its plans are asked for again, one at a time.

        Returns:
            Workers whose death was the fault of a plan: each died with one that others have died
            with, too.
        """
        self._running -= 1
        killed: list[int] = []
        for place in reversed(range(chunk.start, chunk.stop)):
            died = self._died[place]
            died.append(worker)
            if len(died) < DEATHS:
                self._waiting.appendleft(Chunk(place, place + 1, worker))
                continue
            plan = self._plans[place]
            name = "the full model" if plan is None else f"plan {plan.digest}"
            self._errors[place] = EngineError(
                f"{name}: {DEATHS} actors died while they ran it; the last: {cause}"
            )
            killed += died
        return killed

    def results(self) -> list[Any]:
        """One for each plan.

        Raises:
            LiveprunError: of the first plan, by place, that has one.
        """
        if self._errors:
            raise self._errors[min(self._errors)]
        return self._results


def _chunks(plans: int, workers: int, least: int) -> Iterator[Chunk]:
    """Each a half of what is left, shared by all workers: large first, small at the end.

    So a call needs few chunks, and nobody waits long for the last, however unlike the workers are
    (guided self-scheduling: Polychronopoulos and Kuck 1987). The cut hangs on the numbers alone.
    """
    start = 0
    while start < plans:
        size = max(least, (plans - start) // (2 * workers))
        stop = min(plans, start + size)
        yield Chunk(start, stop)
        start = stop
