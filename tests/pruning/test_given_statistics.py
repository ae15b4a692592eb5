"""Plans from statistics without rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from liveprune.pruning.calibration.statistics import LayerStatistics, RoutingStatistics
from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.errors import DataError
from liveprune.pruning.methods import METHODS
from liveprune.pruning.plan_io import load_plan
from liveprune.pruning.prune import make_plan
from liveprune.server.cli import app

MakeModel = Callable[..., Path]
NAN = np.full(8, np.nan)
COUNTING = {"frequency", "soft", "dern"}
BY_OUTPUTS = {"ean", "man", "msan", "reap", "weighted-ean", "tb-coverage"}
WITHOUT = {"easy-ep", "hc-smoe", "m-smoe", "mone", "stun-coactivation", "moe-i2", "naee", "ream"}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = ["The quick brown fox", "jumps over the lazy dog.", "Pack my box with liquor jugs"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def model(tiny_model: MakeModel) -> Path:
    return tiny_model("qwen2_moe")


@pytest.fixture
def passed(model: Path, rows: Path, tmp_path: Path) -> RoutingStatistics:
    """What a pass over the rows leaves."""
    cache = tmp_path / "cache"
    make_plan(model, method="frequency", experts=5, calibration=rows, statistics_cache=cache)
    (file,) = cache.iterdir()
    return RoutingStatistics.load(file)


def live(passed: RoutingStatistics, *, sampled: bool = True) -> RoutingStatistics:
    """As live traffic would leave it."""
    layers = {}
    for index, layer in passed.layers.items():
        sums = layer.sums.copy()
        if not sampled:
            sums[:, :, 1:] = np.nan
        largest = layer.max_activation.copy() if sampled else NAN.copy()
        layers[index] = LayerStatistics(sums, largest, NAN.copy())
    return replace(passed, layers=layers, calibration="a" * 32)


def plan_of(model: Path, method: str, **arguments: Any) -> Any:
    return make_plan(model, method=method, experts=5, allocate="uniform", **arguments)


@pytest.mark.parametrize("method", sorted(COUNTING | BY_OUTPUTS))
def test_the_same_plan_as_from_the_rows(
    method: str, model: Path, rows: Path, passed: RoutingStatistics, tmp_path: Path
) -> None:
    file = tmp_path / "live.safetensors"
    live(passed).save(file)
    plan = plan_of(model, method, statistics=file)
    assert plan == plan_of(model, method, calibration=rows)
    assert plan.lineage.calibration == "a" * 32
    assert "max_rows" not in plan.lineage.parameters


@pytest.mark.parametrize("method", sorted(WITHOUT | BY_OUTPUTS))
def test_methods_that_need_more_are_refused_by_name(
    method: str, model: Path, passed: RoutingStatistics, tmp_path: Path
) -> None:
    file = tmp_path / "live.safetensors"
    live(passed, sampled=method in WITHOUT).save(file)
    message = rf"method {method}: (needs .* does not hold|reads calibration rows)"
    with pytest.raises(DataError, match=message):
        plan_of(model, method, statistics=file)


def test_every_method_that_judges_by_data_is_in_one_of_the_sets() -> None:
    judges = {name for name, x in METHODS.items() if x.needs_calibration}
    assert judges == COUNTING | BY_OUTPUTS | WITHOUT


@pytest.mark.parametrize("method", sorted(COUNTING))
def test_counts_alone_suffice_for_methods_that_count(
    method: str, model: Path, rows: Path, passed: RoutingStatistics, tmp_path: Path
) -> None:
    file = tmp_path / "live.safetensors"
    live(passed, sampled=False).save(file)
    assert plan_of(model, method, statistics=file) == plan_of(model, method, calibration=rows)


def test_super_experts_need_outputs(model: Path, passed: RoutingStatistics, tmp_path: Path) -> None:
    file = tmp_path / "live.safetensors"
    live(passed, sampled=False).save(file)
    with pytest.raises(DataError, match="keep_super_experts: needs the experts' largest outputs"):
        plan_of(model, "frequency", statistics=file, keep_super_experts=True)


def test_other_models_and_both_sources_are_refused(
    model: Path, rows: Path, passed: RoutingStatistics, tmp_path: Path
) -> None:
    file = tmp_path / "live.safetensors"
    replace(live(passed), model="other").save(file)
    with pytest.raises(DataError, match="statistics of the model other, expected"):
        plan_of(model, "reap", statistics=file)
    short = dict(list(live(passed).layers.items())[:1])
    replace(live(passed), layers=short, model=fingerprint_model(model)).save(file)
    with pytest.raises(DataError, match="found experts by layer"):
        plan_of(model, "reap", statistics=file)
    with pytest.raises(DataError, match="expected one of the two"):
        plan_of(model, "reap", statistics=file, calibration=rows)
    with pytest.raises(DataError, match="not readable"):
        plan_of(model, "reap", statistics=tmp_path / "missing")


def test_from_the_command_line(model: Path, passed: RoutingStatistics, tmp_path: Path) -> None:
    file, output = tmp_path / "live.safetensors", tmp_path / "plan.json"
    live(passed).save(file)
    arguments = ["prune", str(model), "-o", str(output), "--method", "reap", "--experts", "5"]
    run = CliRunner().invoke(app, [*arguments, "--statistics", str(file), "--plan-only"])
    assert run.exit_code == 0, run.output
    assert load_plan(output) == plan_of(model, "reap", statistics=file)
