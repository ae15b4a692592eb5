"""A server's experiments over a store, with made-up traffic and a clock that tests set."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from liveprune.server.experiment_promotion import Promoter
from liveprune.server.experiment_service import ExperimentService
from liveprune.server.experiment_worker import ExperimentWorker
from liveprune.server.experiments.definition import Experiment, experiment_from
from liveprune.server.experiments.live import Assignment, LiveExperiments
from liveprune.server.operations import State
from liveprune.server.store.store import Store
from tests.server.fake_control import MODEL, FakeControl, view

DEFINITION: dict[str, Any] = {
    "name": "halve",
    "arms": [
        {"name": "full", "variant": "full", "weight": 0.5},
        {"name": "pruned", "variant": "e4", "weight": 0.5},
    ],
    "control": "full",
    "primary": {"metric": "e2e_seconds"},
    "guardrails": [{"metric": "loop", "margin": 0.2}],
    "minimum_units": 20,
    "rollback_units": 20,
    "planned_units": 400,
    "minimum_seconds": 100,
    "warm_up_seconds": 0,
    "cool_down_seconds": 0,
    "actions": ["notify", "rollback", "ramp", "promote"],
}
START = 2e9
"""Later than now, so that what other code stamps with the real time lies before it."""


def definition(**changes: Any) -> dict[str, Any]:
    return {**DEFINITION, **changes}


def experiment(**changes: Any) -> Experiment:
    return experiment_from({"model": MODEL, **definition(**changes)})


class Clock:
    """Of the store and of the process."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self, *_: object) -> float:
        return self.now


class Site:
    """One replica."""

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        replica: str = "one",
        *,
        url: str | None = None,
        interval: float = 10.0,
    ) -> None:
        url = url or f"sqlite:///{folder / 'store.db'}"
        self.store = Store(folder / "files", "m", url=url, replica=replica, clock=clock)
        self.clock = clock
        self.control = FakeControl(known=[view("full"), view("e4"), view("e2"), view("off")])
        self.control.known[3] = view("off", state="standby")
        self.live = LiveExperiments(self.store.salt(), clock)
        self.promoter = Promoter(self.store, self.control, poll=0.001, clock=clock)
        self.worker = ExperimentWorker(self.store, self.live, self.promoter, interval=interval)
        self.service = ExperimentService(
            self.store, self.live, self.worker, self.control, [MODEL, "other"]
        )
        self._random = np.random.default_rng(len(replica))

    async def start(self, **changes: Any) -> None:
        await self.service.start(definition(**changes), key=None)

    def route(self, user: str) -> Assignment | None:
        return self.live.route(MODEL, {}, {"user": user}, None, user, ["full", "e4", "e2"])

    def serve(
        self,
        count: int,
        *,
        first: int = 0,
        gain: float = 0.0,
        loops: Mapping[str, float] | None = None,
        lost: Callable[[Assignment], bool] = lambda _: False,
    ) -> dict[str, str]:
        """``count`` users send a request each; who got which arm."""
        arms = {}
        for number in range(first, first + count):
            found = self.route(f"user-{number}")
            if found is None or lost(found):
                continue
            arms[f"user-{number}"] = found.arm
            mean = 1.0 if found.arm == "full" else 1.0 - gain
            loop = self._random.random() < (loops or {}).get(found.arm, 0.0)
            values = {"e2e_seconds": self._random.gamma(9, mean / 9), "loop": float(loop)}
            self.live.finished(found, values)
            self.live.answered(f"id-{number}", found)
        return arms

    async def look(self) -> None:
        await self.worker.look()

    async def promoted(self) -> list[Any]:
        """Look until no promotion is under way; the swaps that were asked for."""
        self.control.steps = self.control.steps or [State.DONE]
        await self.worker.look()
        if self.promoter._task is not None:
            await asyncio.wait({self.promoter._task})
        return [call[1] for call in self.control.calls if call[0] == "swap"]

    def shares(self, name: str = "halve") -> dict[str, int]:
        return self.store.experiments.get(name).shares[-1]

    def state(self, name: str = "halve") -> str:
        return self.store.experiments.get(name).state.value

    def verdicts(self, name: str = "halve") -> list[str]:
        return [x.decision["verdict"] for x in self.store.decisions.of(name)]
