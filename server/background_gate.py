"""The gate that every request of a candidate passes on its way to the serving engine.

Users come first. A request is let in only

* while no user waits for a first token,
* as the only one where users' answers are being written,
* while candidates have had no more than their share of the engine's time,
* and unless users' tokens come clearly slower with candidates than without: then it pauses, longer
  each time it was right to, and tries again.

Who waits too long is sent away, so that a candidate does not keep its rows while nothing happens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from liveprune.pruning.errors import ConflictError

PATIENCE = 60.0
"""Seconds that a request waits before it is sent away."""
POLL = 0.01
BURST = 1.0
"""Seconds of engine time that candidates may have saved up while there was nothing to do."""
SLOWER = 1.2
"""Users' tokens come slower if the time between them is this many times that without candidates."""
WEIGHT = 0.2
"""Of the newest step in both moving means."""
QUIET_STEPS, LOADED_STEPS = 5, 3
"""Steps that the means without and with candidates need to count: few slow ones are too many."""
PAUSES = (0.25, 30.0)
"""Seconds, the first one and the longest."""


class Traffic(Protocol):
    """What the gate must know of users (``patches.user_traffic.UserTraffic``)."""

    @property
    def in_flight(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    def listen(self, listener: Callable[[float], None], /) -> None: ...


class _Mean:
    """A moving mean of seconds between tokens."""

    def __init__(self) -> None:
        self.value = 0.0
        self.steps = 0

    def add(self, seconds: float) -> None:
        # The first ones weigh alike, so that none of them is the mean for long.
        weight = max(WEIGHT, 1 / (self.steps + 1))
        self.value += weight * (seconds - self.value)
        self.steps += 1


class BackgroundGate:
    """Lives in the event loop of the API server; a request is inside from ``place`` to its end."""

    def __init__(
        self,
        traffic: Traffic,
        *,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.share = 1.0
        """Of the engine's time, at most; 1: all that users leave."""
        self.inside = 0
        """Requests of candidates that the engine has."""
        self.busy_seconds = 0.0
        """That it had some."""
        self._traffic = traffic
        self._patience = patience
        self._clock = clock
        self._turn = asyncio.Lock()
        self._saved = BURST
        self._at = clock()
        self._quiet, self._loaded = _Mean(), _Mean()
        self._pause = PAUSES[0]
        self._paused_until = 0.0
        traffic.listen(self._step)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place, in order, and hold it.

        Raises:
            ConflictError: users left none for too long.
        """
        async with self._turn:
            deadline = self._clock() + self._patience
            while not self.opens:
                if self._clock() > deadline:
                    raise ConflictError(
                        f"users left background work no place for {self._patience:g} s; try again"
                    )
                await asyncio.sleep(POLL)
            self._account()
            self.inside += 1
        try:
            yield
        finally:
            self._account()
            self.inside -= 1

    @property
    def opens(self) -> bool:
        """Whether one more would be let in now."""
        self._account()
        users = self._traffic.in_flight
        if self._traffic.waiting or self._saved <= 0:
            return False
        if not users:  # there is nobody to slow down, whatever happened before
            return True
        # Without its quiet level nobody can say whether users are slowed down.
        known = self._quiet.steps >= QUIET_STEPS
        return known and self.inside == 0 and self._at >= self._paused_until

    def _account(self) -> None:
        """Bring the books up to now."""
        now = self._clock()
        passed, self._at = now - self._at, now
        used = passed if self.inside else 0.0
        self.busy_seconds += used
        self._saved = min(self._saved + self.share * passed - used, BURST)

    def _step(self, seconds: float) -> None:
        """Of users' tokens: ``seconds`` passed since those before."""
        if not self.inside:
            self._quiet.add(seconds)
            return
        if self._clock() < self._paused_until:  # of a request that was inside before
            return
        self._loaded.add(seconds)
        if self._loaded.steps < LOADED_STEPS or self._quiet.steps < QUIET_STEPS:
            return
        shortest, longest = PAUSES
        if self._loaded.value > SLOWER * self._quiet.value:
            self._paused_until = self._clock() + self._pause
            self._pause = min(2 * self._pause, longest)
            self._loaded = _Mean()
        else:
            self._pause = shortest
