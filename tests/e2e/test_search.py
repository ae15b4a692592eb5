"""``liveprune prune --method eep`` on real vLLM: killed, resumed, and the same as never killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.checkpoint.inspect import inspect
from liveprune.pruning.demo import model_path, rows_path
from liveprune.pruning.evaluation.task import load_task
from liveprune.pruning.evaluation.transformers_engine import TransformersEngine
from liveprune.pruning.plan_io import load_plan
from tests.e2e.engine import ENVIRONMENT, PLUGINS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

ROWS, KILLED_AFTER = 30, 5


def command(output: Path) -> list[str]:
    data = [arg for s in ("train", "dev", "test") for arg in (f"--{s}", str(rows_path("add", s)))]
    return [
        *(sys.executable, "-m", "liveprune.server", "prune", str(model_path())),
        *("-o", str(output), "--method", "eep", "--experts", "4", "--top-k", "1", *data),
        *("--max-rows", str(ROWS), "--max-answer-tokens", "12", "--dtype", "float32"),
        *("--start", "reap", "--set", "inits=6", "--set", "prune_candidates=20"),
        *("--set", "merge_candidates=20", "--set", "children=4", "--set", "block=10"),
    ]


def environment() -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key != PLUGINS}
    return inherited | ENVIRONMENT


def run(output: Path) -> str:
    done = subprocess.run(
        command(output), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def report(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (output.with_name(output.name + ".search") / "report.json").read_text()
    )
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "pruned"
    run(output)
    return output


def test_the_result_is_an_ordinary_answer_of_the_reference(unbroken: Path) -> None:
    """What vLLM scored is what transformers scores, on all three sets of rows."""
    found = report(unbroken)
    engine = TransformersEngine(model_path())
    for split in ("train", "dev", "test"):
        task = load_task(
            rows_path("add", split),
            model_path(),
            measure="exact",
            max_rows=ROWS,
            max_answer_tokens=12,
        )
        plans = [None, load_plan(unbroken)]
        full, merged = task.values(engine, plans).mean(axis=1)
        assert found["full"][split]["mean"] == pytest.approx(full)
        assert found["stages"][-1]["scores"][split]["mean"] == pytest.approx(merged)


def test_the_checkpoint_holds_the_plan(unbroken: Path) -> None:
    found = inspect(unbroken)
    assert [(x.kept, x.top_k) for x in found.layers] == [(4, 1)] * 4
    assert load_plan(unbroken).digest == report(unbroken)["stages"][-1]["digest"]


def test_killed_and_resumed_is_as_if_nothing_had_happened(unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "pruned"
    journal = tmp_path / "pruned.search" / "journal.jsonl"
    child = subprocess.Popen(
        command(output),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not journal.exists() or journal.read_bytes().count(b"\n") < KILLED_AFTER:
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    child.kill()
    child.wait()
    kept = journal.read_bytes()
    assert not output.exists()
    run(output)
    assert journal.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    first, second = report(unbroken), report(output)
    for found in (first, second):
        del found["cost"]["wall_seconds"], found["cost"]["cpu_seconds"], found["command"]
    assert second == first
    assert load_plan(output) == load_plan(unbroken)
