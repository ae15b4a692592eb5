"""A grid run on a plain function instead of an engine: failures, resuming, identity."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from liveprune.pruning.errors import DataError
from liveprune.pruning.pareto import timing
from liveprune.pruning.pareto.report import write_report
from liveprune.pruning.pareto.result import ParetoResult
from liveprune.pruning.pareto.timing import Ratio, Sample, Workload
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_io import load_plan
from liveprune.pruning.search.evaluator import SearchCancelledError
from liveprune.pruning.search.run import Progress
from tests.pruning.pareto.bench import WORKLOAD, Bench, sample


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


def test_what_was_not_timed_is_timed_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(engine: object, plan: Plan, workload: Workload) -> Sample:
        measured.append(plan.digest)
        return sample(plan)

    monkeypatch.setattr(timing, "measure", measure)
    before = bench.run(workload=WORKLOAD, untimed="not now")
    assert measured == []
    assert before.to_json()["timing"] == {"left_out": "not now", "workload": None}
    timed = bench.run(workload=WORKLOAD, untimed="")
    plans = {str(point.digest) for point in timed.points if point.measured is not None}
    assert sorted(measured) == sorted(plans)
    for point in timed.points:
        if point.measured is not None:
            assert point.measured.speed is not None
            assert point.measured.speed.decode.wall == Ratio(2.0, 2.0, 2.0)
    assert timed.full.speed is not None
    assert facts(bench.run(workload=WORKLOAD, untimed="not now")) == facts(before)
    assert facts(bench.run(workload=WORKLOAD, untimed="")) == facts(timed)


def test_a_plan_too_fast_for_the_clock_fails_neither_run_nor_full_model(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if, beside it, the full model took no longer for more tokens."""
    named = load_named(bench)

    def measure(engine: object, plan: Plan, workload: Workload) -> Sample:
        if plan.digest == named["aimer-e2"]:
            return {side: [[[9.0, 9.0]] * 3] * 3 for side in ("full", "plan")}
        return sample(plan)

    monkeypatch.setattr(timing, "measure", measure)
    found = bench.run("timed", workload=WORKLOAD, untimed="")
    speeds = {x.asked.name: x.measured for x in found.points if x.measured is not None}
    failed = speeds.pop("aimer-e2")
    assert failed.speed is None
    assert "time more tokens" in str(failed.speed_failure)
    assert all(x.speed is not None for x in speeds.values())
    assert found.full.speed is not None
    # 2 prompts of 4 further tokens in 5 - 1 s
    assert found.full.speed.decode.tokens_per_second == 2


def load_named(bench: Bench) -> dict[str, str | None]:
    """Digests of plans by name."""
    return {point.asked.name: point.digest for point in bench.run("named").points}


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
