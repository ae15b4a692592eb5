"""``liveprune demo``: the first command of the README, on fewer rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from liveprune.pruning.demo import task_names

pytestmark = pytest.mark.engine


def test_the_demo_keeps_its_task_with_half_the_experts(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "liveprune.server", "demo", "-o", str(out), "--rows", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    full, pruned = json.loads((out / "demo.json").read_text())
    assert pruned["expert_bytes"] * 2 == full["expert_bytes"]
    assert set(full["accuracy"]) == set(task_names())
    assert full["accuracy"]["sort"] >= 0.9
    assert pruned["accuracy"]["sort"] >= 0.9
    # What the pruned model gave up, it really gave up: it is another model.
    assert min(pruned["accuracy"].values()) < 0.6
    assert full["tokens_per_second"] > 0
    assert (out / "demo.png").stat().st_size > 10_000
    for line in ("accuracy, sort (pruned for it)", "resident memory", "tokens per second"):
        assert line in done.stdout


def test_an_unknown_task_is_refused_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "liveprune.server", "demo", "--task", "cook"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "expected one of" in done.stderr
