"""``liveprune pareto`` on real engines: killed and resumed, or in actors, it ends the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.demo import model_path, rows_path
from liveprune.pruning.plan_io import load_plan
from tests.e2e.engine import ENVIRONMENT, PLUGINS

PLANS = 6
"""Two methods, frequency, three random prunings."""
LINES = PLANS + 2 + PLANS
"""Of a whole journal: plans, scores of the full model and of all plans, times."""
SPEED = ("speed", "speed_failure", "on_front")
"""What hangs on the clock, in a point."""


def command(folder: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "liveprune.server", "pareto", str(model_path())),
        *("-o", str(folder), "--experts", "4", "--top-k", "1", "--dtype", "float32"),
        *("--data", str(rows_path("add", "test")), "--max-answer-tokens", "12"),
        *("--calibration", str(rows_path("add", "train")), "--max-rows", "20"),
        *("--rounds", "3", "--batch", "2", "--prompt-tokens", "32", "--new-tokens", "9", *more),
    ]


VLLM = ("--engine", "vllm", "--methods", "reap,hc-smoe")
TRANSFORMERS = (
    *("--engine", "transformers", "--methods", "reap,eep", "--measure", "nll"),
    *("--train", str(rows_path("add", "train")), "--dev", str(rows_path("add", "dev"))),
    *("--set", "inits=3", "--set", "prune_candidates=5", "--set", "merge_candidates=4"),
    *("--set", "children=2", "--set", "racing=false"),
)


def environment() -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key != PLUGINS}
    return inherited | ENVIRONMENT


def run(folder: Path, *more: str) -> str:
    done = subprocess.run(
        command(folder, *more), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run_until(lines: int, folder: Path, *more: str) -> bytes:
    """Kill the command once its journal has so many lines; the whole ones that are left."""
    journal = folder / "journal.jsonl"
    with subprocess.Popen(
        command(folder, *more),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:
        try:
            while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
                assert child.poll() is None, "it ended before it could be killed"
                time.sleep(0.005)
        finally:
            child.kill()
    left = journal.read_bytes()
    whole = left[: left.rfind(b"\n") + 1]
    assert lines <= whole.count(b"\n") < LINES
    return whole


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def lasting(found: dict[str, Any]) -> dict[str, Any]:
    """A report without what differs from run to run: speeds and what follows from them."""
    cost = {key: value for key, value in found["cost"].items() if not key.endswith("_seconds")}
    left = {key: value for key, value in found.items() if key not in ("command", "front", "timing")}
    without = [
        {key: value for key, value in point.items() if key not in SPEED}
        for point in (found["full"], *found["points"])
    ]
    return {**left, "cost": cost, "full": without[0], "points": without[1:]}


def check_same(folder: Path, other: Path) -> None:
    """Scores, bytes and plans."""
    first, second = report(folder), report(other)
    assert lasting(first) == lasting(second)
    plans = [point["plan"] for point in first["points"]]
    assert len(plans) == PLANS
    for plan in plans:
        assert load_plan(folder / plan) == load_plan(other / plan)


def check_timed(folder: Path) -> None:
    found = report(folder)
    assert found["timing"]["left_out"] is None
    assert found["timing"]["workload"]["rounds"] == 3
    for point in found["points"]:
        # On a busy machine such short work may drown in what disturbs it, which is then said.
        assert point["speed"] is not None or "time more tokens" in point["speed_failure"]


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_killed_twice_and_resumed_is_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, *VLLM)
    among_plans = run_until(3, broken, *VLLM)
    among_times = run_until(PLANS + 4, broken, *VLLM)
    assert among_times.startswith(among_plans)
    assert not (broken / "report.json").exists()
    run(broken, *VLLM)
    journal = (broken / "journal.jsonl").read_bytes()
    assert journal.startswith(among_times)
    assert journal.count(b"\n") == LINES
    for folder in (whole, broken):
        check_timed(folder)
    check_same(whole, broken)


@pytest.mark.timeout(1500)
def test_with_two_actors_the_report_is_that_of_one_engine(tmp_path: Path) -> None:
    alone, pooled = tmp_path / "alone", tmp_path / "pooled"
    run(alone, *TRANSFORMERS)
    run(pooled, *TRANSFORMERS, "--actors", "2")
    check_same(alone, pooled)
    found = report(pooled)
    assert found["timing"]["workload"] is None
    assert "times of actors are those of several engines" in found["timing"]["left_out"]
    assert all(point["speed"] is None for point in (found["full"], *found["points"]))
    assert found["timing"]["left_out"] in (pooled / "report.html").read_text()
    # What the report promises: without actors the same folder goes on, and times.
    before = (pooled / "journal.jsonl").read_bytes()
    run(pooled, *TRANSFORMERS)
    journal = (pooled / "journal.jsonl").read_bytes()
    assert journal.startswith(before)
    assert before.count(b"\n") + PLANS == journal.count(b"\n") == LINES
    check_timed(pooled)
    check_same(alone, pooled)
