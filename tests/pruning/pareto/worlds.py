"""A grid without a model's answers: scores are a plain function of plan and row, time stands still
but for what an engine says that its work takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import EngineError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.pareto import timing
from liveprune.pruning.pareto.grid import GridPoint, make_grid
from liveprune.pruning.pareto.result import ParetoResult
from liveprune.pruning.pareto.run import run_pareto
from liveprune.pruning.pareto.timing import Workload
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from tests.pruning.search.fakes import FakeTask

WORK = Workload.of([range(9)], batch=1, prompt_tokens=9, new_tokens=3, rounds=3)


def plan_of(spec: ModelSpec, kept: Sequence[int] = (0, 1), top_k: int = 1) -> Plan:
    layers = [LayerPlan(x.index, x.experts, top_k, tuple(kept)) for x in spec.layers]
    return Plan(
        spec.architecture.model_type, spec.num_hidden_layers, tuple(layers), Lineage("test")
    )


class Engine:
    """Generates nothing, in a time that falls with the experts kept and active."""

    def __init__(self) -> None:
        self.now = 0.0
        self.broken: set[str] = set()
        self.calls = 0

    def clock(self) -> tuple[float, float]:
        return self.now, self.now

    def generate(self, plans: Sequence[Plan | None], prompts: Any, **options: Any) -> list[Any]:
        self.calls += 1
        (plan,) = plans
        if plan is not None and plan.digest in self.broken:
            raise EngineError("no time for this one")
        work = 1.0 if plan is None else 0.2 + 0.1 * len(plan.layers[0].kept)
        self.now += work * (len(prompts[0]) + 10 * options["max_tokens"])
        return []


def choose(spec: ModelSpec) -> Callable[[GridPoint], Plan]:
    """``reap`` keeps the last experts, ``frequency`` the first, ``random`` some by seed."""

    def make(point: GridPoint) -> Plan:
        experts, number = spec.layers[0].experts, int(point.budget[0])
        if point.method == "aimer":
            raise ZeroDivisionError("aimer has a bug")
        if point.method == "reap":
            kept = range(experts - number, experts)
        elif point.method == "frequency":
            kept = range(number)
        else:
            key = [hashlib.blake2b(f"{point.seed} {i}".encode()).digest() for i in range(experts)]
            kept = sorted(range(experts), key=lambda i: key[i])[:number]
        return plan_of(spec, sorted(kept), point.top_k or 2)

    return make


def fitness(plan: Plan | None, row: int) -> float:
    """The last experts are the good ones."""
    if plan is None:
        return 0.95
    kept = plan.layers[0].kept
    return min(0.95, 0.1 + 0.02 * (row % 3) + sum(kept) / 20)


class World:
    """One grid that can be run again and again."""

    def __init__(self, model: Path, folder: Path, monkeypatch: Any) -> None:
        self.model, self.folder = model, folder
        self.spec = ModelSpec.from_path(model)
        self.engine = Engine()
        self.make: Callable[[GridPoint], Plan] = choose(self.spec)
        self.tasks = {
            name: FakeTask(fitness, size, name, binary=True)
            for name, size in (("add", 60), ("sort", 40))
        }
        self.methods = ["reap"]
        self.budgets = {"2": "2", "4": "4"}
        self.arguments: dict[str, Any] = {"seed": 0}
        self.made: list[str] = []
        monkeypatch.setattr(timing, "_now", lambda: self.engine.clock())

    def run(self, **changes: Any) -> ParetoResult:
        def make(point: GridPoint) -> Plan:
            self.made.append(point.name)
            return self.make(point)

        grid = make_grid(
            self.spec,
            methods=self.methods,
            budgets=self.budgets,
            top_ks=[1, 2],
            calibrated=True,
        )
        options: dict[str, Any] = {
            "grid": grid,
            "make": make,
            "tasks": self.tasks,
            "folder": self.folder,
            "arguments": self.arguments,
            "engine_name": "fake",
            "workload": WORK,
            **changes,
        }
        return run_pareto(self.model, self.spec, self.engine, **options)
