"""How far a job is, when it will be through, and the best so far: what operators see of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from liveprune.pruning.search.evaluator import SearchCancelledError
from liveprune.pruning.search.run import Progress
from liveprune.server.jobs.heart import Heart

MIN_SECONDS = 0.2
"""Between two pieces of news of the same stage."""


class Tracker:
    """Turns the steps of a job's work into news, and its cancellation into an error."""

    def __init__(self, heart: Heart, clock: Callable[[], float] = time.monotonic) -> None:
        self._heart = heart
        self._clock = clock
        self._stage = ""
        self._from = (0.0, 0)
        self._told = 0.0

    def search(self, progress: Progress) -> None:
        """Of ``pruning.search``: candidates. What is repeated from the journal took no time."""
        if progress.replaying:
            self._stage = ""
        self._news(progress.stage, progress.done, progress.total, forced=True, as_one=True)
        if progress.best is not None:
            self._heart.tell(best={"fitness": progress.best, "stage": progress.stage})

    def steps(self, stage: str) -> Callable[[int, int], None]:
        """Of anything else that counts; raises SearchCancelledError once the job is cancelled."""

        def tell(done: int, total: int) -> None:
            self.check()
            self._news(stage, done, total, forced=done == total)

        return tell

    def enter(self, stage: str) -> None:
        """Begin what does not count."""
        self.check()
        self._news(stage, 0, 0, forced=True)

    def check(self) -> None:
        """Raise SearchCancelledError once the job is cancelled."""
        if self._heart.cancelled.is_set():
            raise SearchCancelledError("told to stop")

    def _news(
        self, stage: str, done: int, total: int, *, forced: bool, as_one: bool = False
    ) -> None:
        now = self._clock()
        key = "search" if as_one else stage
        if key != self._stage:
            self._stage, self._from = key, (now, done)
        elif not forced and now - self._told < MIN_SECONDS:
            return
        self._told = now
        begun, first = self._from
        left = None
        if done > first:
            left = round((now - begun) / (done - first) * max(total - done, 0), 1)
        ratio = min(done / total, 1.0) if total else None
        self._heart.tell(
            progress={
                "stage": stage,
                "done": done,
                "total": total,
                "ratio": ratio,
                "seconds_left": left,
            }
        )
