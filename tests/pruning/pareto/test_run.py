"""A grid run on a plain function instead of an engine: failures, resuming, identity."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.errors import DataError, PlanError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.pareto.grid import GridPoint, make_grid
from liveprune.pruning.pareto.report import write_report
from liveprune.pruning.pareto.result import ParetoResult
from liveprune.pruning.pareto.run import run_pareto
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_io import load_plan
from liveprune.pruning.prune import make_plan
from liveprune.pruning.search.evaluator import SearchCancelledError
from liveprune.pruning.search.run import Progress
from tests.pruning.search.fakes import FakeTask

MakeModel = Callable[..., Path]


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


@pytest.fixture
def bench(tiny_model: MakeModel, tmp_path: Path) -> Bench:
    return Bench(tiny_model("mixtral"), tmp_path)


def facts(result: ParetoResult) -> dict[str, Any]:
    form = result.to_json()
    del form["cost"]
    return form


def test_points_controls_failures_and_what_is_skipped(bench: Bench) -> None:
    found = facts(bench.run())
    points = {point["name"]: point for point in found["points"]}
    assert set(points) == {
        *("aimer-e2", "aimer-e6", "weight-norm-e2", "weight-norm-e6"),
        *(f"random-e{e}-s{s}" for e in (2, 6) for s in range(3)),
    }
    assert "no such thing" in json.dumps(points["weight-norm-e6"])
    skipped = json.dumps(found["skipped"])
    assert "frequency needs calibration rows" in skipped
    assert "aimer-e9" in skipped
    for name, point in points.items():
        if name != "weight-norm-e6":
            plan = load_plan(bench.folder / "run/plans" / f"{name}.json")
            assert plan.digest in json.dumps(point)


def test_stopped_at_every_step_and_run_again_it_ends_the_same(bench: Bench) -> None:
    whole = facts(bench.run())
    bench.made.clear()
    cancel = threading.Event()
    steps = 0

    def stop_soon(progress: Progress) -> None:
        nonlocal steps
        steps += not progress.replaying
        if steps % 3 == 2 and not progress.replaying:
            cancel.set()

    for _ in range(60):
        try:
            again = bench.run("again", cancel=cancel, progress=stop_soon)
            break
        except SearchCancelledError:
            cancel.clear()
    else:
        pytest.fail("it never came to an end")
    assert facts(again) == whole
    assert len(bench.made) == len(set(bench.made)), "each plan is made once"


def test_another_run_in_the_folder_is_refused(bench: Bench) -> None:
    bench.run()
    with pytest.raises(DataError, match=r"arguments\.seed was 0, now is 1"):
        bench.run(arguments={"seed": 1})
    plan = bench.folder / "run/plans/aimer-e2.json"
    plan.write_text((bench.folder / "run/plans/aimer-e6.json").read_text())
    with pytest.raises(DataError, match="start anew"):
        bench.run()


def test_the_report_is_whole_and_repeatable(bench: Bench) -> None:
    found = {**bench.run().to_json(), "command": "liveprune pareto"}
    json.dumps(found, allow_nan=False)
    write_report(found, bench.folder / "one.html")
    write_report(found, bench.folder / "two.html")
    page = (bench.folder / "one.html").read_text()
    assert page == (bench.folder / "two.html").read_text()
    assert "<script" not in page
    for name in ("aimer-e2", "weight-norm-e6", "random-e6-s2"):
        assert name in page
    assert "no such thing" in page
