"""What all methods that merge have in common, on models of every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liveprune.pruning.calibration.rows import Rows
from liveprune.pruning.evaluation.carried_out import carried_out
from liveprune.pruning.methods import METHODS
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_guards import check_plan
from liveprune.pruning.plan_io import load_plan, save_plan
from liveprune.pruning.prune import make_plan
from tests import reference
from tests.models import FAMILIES
from tests.pruning.methods.folding import with_copies

MakeModel = Callable[..., Path]
GROUPS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES if family != "deepseek_v3"),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
    ("deepseek_v3", {"n_group": 2, "topk_group": 1}),
]
WAYS = [
    ("m-smoe", True),
    ("m-smoe", False),
    ("hc-smoe", True),
    ("hc-smoe", False),
    ("ream", True),
    ("ream", False),
    ("dern", None),
]
IDS = torch.arange(20, 60)[None]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = ["The quick brown fox", "jumps over the lazy dog.", "Pack my box with liquor jugs"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize(("method", "stay"), WAYS)
@pytest.mark.parametrize(("family", "overrides"), GROUPS)
def test_plans_fit_every_family(
    tiny_model: MakeModel,
    rows: Path,
    tmp_path: Path,
    family: str,
    overrides: dict[str, Any],
    method: str,
    *,
    stay: bool | None,
) -> None:
    model = tiny_model(family, **overrides)
    spec = ModelSpec.from_path(model)
    plan = make_plan(model, method=method, experts=4, calibration=rows, keep_gate_rows=stay)
    check_plan(plan, spec)
    assert sum(x.kept_experts for x in plan.layers) == 4 * len(spec.layers)
    assert all(x.merges and x.keeps_gate_rows == bool(stay) for x in plan.layers)
    assert plan.lineage.parameters.get("keep_gate_rows") == stay
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    full = reference.load(model)
    with torch.no_grad(), carried_out(full, spec, plan):
        found = full(IDS).logits
    with torch.no_grad():
        expected = reference.pruned_model(model, plan)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "stay"), WAYS)
@pytest.mark.parametrize("permute", [False, True])
def test_copies_merge_into_what_they_are_copies_of(
    tiny_model: MakeModel,
    rows: Path,
    tmp_path: Path,
    method: str,
    *,
    permute: bool,
    stay: bool | None,
) -> None:
    """With all experts of a layer alike, whoever stays answers as the base model does.

    Mixtral's weights sum to 1, so that who is chosen does not matter. HC-SMoE does not align: with
    neurons in other orders it makes another model.
    """
    model = with_copies(tiny_model("mixtral"), tmp_path / "model", permute=permute)
    plan = make_plan(model, method=method, experts=4, calibration=rows, keep_gate_rows=stay)
    with torch.no_grad():
        expected = reference.load(model)(IDS).logits
        found = reference.pruned_model(model, plan)(IDS).logits
    same = torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert same == (method != "hc-smoe" or not permute)


def assert_alike(one: Plan, other: Plan) -> None:
    for a, b in zip(one.layers, other.layers, strict=True):
        assert (a.kept, a.expert_map) == (b.kept, b.expert_map)
        found, expected = a.matrices(), b.matrices()
        assert found.keys() == expected.keys()
        for name, matrix in found.items():
            if matrix.dtype.kind == "i":
                assert np.array_equal(matrix, expected[name]), name
            else:
                np.testing.assert_allclose(matrix, expected[name], rtol=1e-4)


@pytest.mark.parametrize(("method", "stay"), WAYS)
def test_batches_and_padding_do_not_matter(
    tiny_model: MakeModel,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    *,
    stay: bool | None,
) -> None:
    model = tiny_model("qwen3_moe")
    options: dict[str, Any] = {"method": method, "experts": 4, "calibration": rows}
    together = make_plan(model, keep_gate_rows=stay, **options)
    batches = Rows.batches
    monkeypatch.setattr(Rows, "batches", lambda self, *_: batches(self, 1))
    alone = make_plan(model, keep_gate_rows=stay, **options)
    assert_alike(together, alone)


def test_defaults(tiny_model: MakeModel, rows: Path) -> None:
    """M-SMoE shares one total out; M-SMoE and HC-SMoE keep gate rows, REAM and DERN do not."""
    model = tiny_model("mixtral")
    plans = {
        name: make_plan(model, method=name, experts=4, calibration=rows)
        for name in ("m-smoe", "hc-smoe", "ream", "dern")
    }
    assert plans["m-smoe"].lineage.parameters["allocate"] == "global"
    assert {name: x.keeps_gate_rows for name, x in plans.items()} == {
        "m-smoe": True,
        "hc-smoe": True,
        "ream": False,
        "dern": False,
    }
    counts = make_plan(model, method="hc-smoe", experts=4, calibration=rows, allocate="global")
    frequent = make_plan(model, method="frequency", experts=4, calibration=rows, allocate="global")
    assert [x.kept_experts for x in counts.layers] == [x.kept_experts for x in frequent.layers]
    assert METHODS["dern"].keep_gate_rows is None
