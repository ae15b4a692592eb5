"""A grid on a plain function instead of an engine, with a method that fails and times by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.pareto.grid import GridPoint, make_grid
from liveprune.pruning.pareto.result import ParetoResult
from liveprune.pruning.pareto.run import run_pareto
from liveprune.pruning.pareto.timing import Sample, Workload
from liveprune.pruning.plan import Plan
from liveprune.pruning.prune import make_plan
from tests.pruning.search.fakes import FakeTask

WORKLOAD = Workload.of([range(99)], batch=2, prompt_tokens=20, new_tokens=5, rounds=3)


def sample(plan: Plan) -> Sample:
    """The plan is twice as fast as the full model."""
    seconds = {
        "full": [[1.0, 1.0], [3.0, 3.0], [5.0, 5.0]],
        "plan": [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]],
    }
    return {side: [taken] * 3 for side, taken in seconds.items()}


def fitness(plan: Plan | None, row: int) -> float:
    """More experts are better; rows differ a little."""
    kept = 24 if plan is None else sum(layer.kept_experts for layer in plan.layers)
    return kept / 25 + 0.0001 * (row % 10)


class Bench:
    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.spec = ModelSpec.from_path(model)
        self.made: list[str] = []
        self.task = FakeTask(fitness, 20, "data")

    def make(self, point: GridPoint) -> Plan:
        self.made.append(point.name)
        if point.name == "weight-norm-e6":
            raise PlanError("no such thing")
        return make_plan(
            self.model,
            method=point.method,
            experts=point.budget,
            top_k=point.top_k,
            seed=point.seed,
        )

    def run(self, folder: str = "run", **changes: Any) -> ParetoResult:
        grid = make_grid(
            self.spec,
            methods=["aimer", "weight-norm"],
            budgets={"2": "2", "6": "6", "9": "9"},
            top_ks=[None],
            calibrated=False,
        )
        fields: dict[str, Any] = {
            "grid": grid,
            "make": self.make,
            "tasks": {"data": self.task},
            "folder": self.folder / folder,
            "arguments": {"seed": 0},
            "engine_name": "fake",
            "workload": None,
            "untimed": "a fake engine",
        }
        return run_pareto(self.model, self.spec, object(), **{**fields, **changes})  # type: ignore[arg-type]
