"""Shadow arms: copies of users' requests to a variant whose answers nobody sees.

A copy is sent once its user has been answered, below user traffic, through the gate of candidates,
and only while background work is on; so it can change nothing of the user's answer. What is
measured of it is the arm's. Its times include its wait behind users: compare quality, not latency.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from liveprune.patches.live_types import Served
from liveprune.patches.request_meter import Generation, Meter
from liveprune.pruning.errors import ConflictError, EngineError, VariantError
from liveprune.server.experiments.live import Assignment, LiveExperiments
from liveprune.server.experiments.quality import Asked
from liveprune.server.measuring import Measured
from liveprune.server.registry import Registry
from liveprune.server.request_values import Times, failed, judged, values_of

WAITING = 64
"""Requests that wait to be copied, at most; the oldest go first."""
AT_ONCE = 4
LONGEST_SECONDS = 300.0
"""A copy that takes longer is an error of its arm."""

Repeat = Callable[[Served, Generation, Meter], Awaitable[None]]
Offer = Callable[[Assignment, Sequence[int], Sequence[int]], None]

logger = logging.getLogger("liveprune.experiments")


class Shadows:
    """Lives in the event loop of the API server; ``offer`` is called for each answered request."""

    def __init__(
        self,
        repeat: Repeat,
        registry: Registry,
        experiments: LiveExperiments,
        *,
        closed: Callable[[], bool],
        answered: Offer,
    ) -> None:
        """Args:
        repeat: has the engine generate once more.
        registry: the live variants.
        experiments: takes what was measured.
        closed: background work is off.
        answered: is shown prompt and answer of each copy (token ids).
        """
        self._repeat, self._registry, self._experiments = repeat, registry, experiments
        self._closed, self._answered = closed, answered
        self._waiting: deque[tuple[Assignment, Generation]] = deque(maxlen=WAITING)
        self._some = asyncio.Event()

    def offer(self, request: Measured) -> None:
        """Copy a request whose arm is a shadow; of several sequences, the first."""
        assigned = request.assignment
        if assigned is None or assigned.shadow is None or not assigned.counted:
            return
        if request.generations and request.generations[0].prompt and not self._closed():
            self._waiting.append((assigned, request.generations[0]))
            self._some.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send copies until the block is left."""
        tasks = [
            asyncio.create_task(self._run(), name=f"shadow {number}") for number in range(AT_ONCE)
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            if not self._waiting:
                self._some.clear()
                continue
            assigned, generation = self._waiting.popleft()
            if self._closed():
                continue
            try:
                await self._copy(assigned, generation)
            except (ConflictError, VariantError) as error:  # no place, or no longer live
                logger.info("a copy for %s was left out: %s", assigned.experiment, error)

    async def _copy(self, assigned: Assignment, generation: Generation) -> None:
        live = self._registry.live.get(str(assigned.shadow))
        if live is None:
            return
        served, meter = live.served, Meter()
        self._registry.pin(served)
        began = time.monotonic()
        try:
            async with asyncio.timeout(LONGEST_SECONDS):
                await self._repeat(served, generation, meter)
        except (EngineError, TimeoutError) as error:
            logger.warning("a copy to %s failed: %s", served.name, error or "it took too long")
        finally:
            meter.close()
            self._registry.unpin(served)
        found = meter.generations()
        if not found or failed(found):
            self._experiments.finished(assigned, {"error": 1.0})
            return
        times = Times(began, meter.first, time.monotonic())
        # What was asked for (JSON, tools) is parsed from answers to users only.
        self._experiments.finished(assigned, values_of(times, found, judged(found, Asked())))
        self._answered(assigned, found[0].prompt, found[0].tokens)
