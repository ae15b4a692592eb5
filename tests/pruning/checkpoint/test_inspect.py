"""Inspection of models and plans, by numbers worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.checkpoint.inspect import inspect
from liveprune.pruning.errors import CheckpointError, PlanError
from liveprune.pruning.plan_io import save_plan
from tests.checkpoints import edited, make_plan, merge_plan
from tests.forms import form_plan

TinyModel = Callable[..., Path]
# Three float32 matrices of 64 by 48 (Mixtral) or 64 by 32 (DeepSeek-V2).
MIXTRAL_EXPERT = 3 * 64 * 48 * 4
DEEPSEEK_EXPERT = 3 * 64 * 32 * 4


def test_a_base_model(tiny_model: TinyModel) -> None:
    """Layer 0 is dense."""
    base = tiny_model("deepseek_v2")
    found = inspect(base)
    layer = {"experts": 8, "kept": 8, "top_k": 2, "bytes": 8 * DEEPSEEK_EXPERT, "mapping": ""}
    form = json.loads(json.dumps(found.to_json()))
    assert form["layers"] == [{"layer": 1, **layer}, {"layer": 2, **layer}]
    assert form["totals"] == {"experts": 16, "kept": 16, "expert_bytes": 16 * DEEPSEEK_EXPERT}
    assert (found.kind, found.architecture) == ("model", "deepseek_v2")
    assert found.router == "softmax, not renormalised"
    assert (found.digest, found.base_model, found.quantisation) == (None, None, None)
    weights = base / "model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little")
    assert found.total_bytes == weights.stat().st_size - 8 - header


def test_a_pruned_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("mixtral")
    plan = make_plan(base, [(0, 1, 2, 3, 4), (1, 2), tuple(range(8))])
    apply_plan(base, plan, tmp_path / "out")
    found = inspect(tmp_path / "out")
    assert [(x.layer, x.experts, x.kept, x.top_k, x.bytes) for x in found.layers] == [
        (0, 8, 5, 2, 5 * MIXTRAL_EXPERT),
        (1, 8, 2, 2, 2 * MIXTRAL_EXPERT),
        (2, 8, 8, 2, 8 * MIXTRAL_EXPERT),
    ]
    assert (found.digest, found.base_model) == (plan.digest, "org/base")


def test_a_plan(tiny_model: TinyModel, tmp_path: Path) -> None:
    plan = merge_plan(tiny_model("mixtral"), 3, router_map=True)
    save_plan(plan, tmp_path / "plan.json")
    found = inspect(tmp_path / "plan.json")
    form = found.to_json()
    row = {"experts": 8, "kept": 3, "top_k": 2, "bytes": None, "mapping": "router_map"}
    assert form["layers"] == [{"layer": i, **row} for i in range(3)]
    assert form["totals"] == {"experts": 24, "kept": 9, "expert_bytes": None}
    assert (found.kind, found.digest, found.router_maps) == ("plan", plan.digest, 3)


@pytest.mark.parametrize(
    ("form", "mapping"),
    [("constants", "constants"), ("merge+map", "expert_map"), ("neurons+kept", "")],
)
def test_every_form(form: str, mapping: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("mixtral")
    plan = form_plan(base, form, kept=(1, 2, 7))
    save_plan(plan, tmp_path / "plan.json")
    apply_plan(base, plan, tmp_path / "out")
    for path, size in ((tmp_path / "plan.json", None), (tmp_path / "out", 3 * MIXTRAL_EXPERT)):
        found = inspect(path)
        assert [(x.experts, x.kept, x.top_k, x.bytes, x.mapping) for x in found.layers] == [
            (8, 3, 2, size, mapping)
        ] * 3
        assert (found.digest, found.router_maps) == (plan.digest, 0)


def test_groups_router_maps_and_quantisation(tiny_model: TinyModel, tmp_path: Path) -> None:
    assert inspect(tiny_model("deepseek_v3")).router == "sigmoid, renormalised, 2 of 4 groups"
    base = tiny_model("mixtral")
    apply_plan(base, merge_plan(base, 4, router_map=True), tmp_path / "mapped")
    assert inspect(tmp_path / "mapped").router_maps == 3
    quantised = edited(base, tmp_path / "q", quantization_config={"quant_method": "fp8"})
    assert inspect(quantised).quantisation == "fp8"


def test_what_is_neither(tmp_path: Path, tiny_model: TinyModel) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(PlanError, match=r"x\.json"):
        inspect(tmp_path / "x.json")
    with pytest.raises(PlanError, match="nothing"):
        inspect(tmp_path / "nothing")
    damaged = edited(tiny_model("mixtral"), tmp_path / "m", num_local_experts=7)
    with pytest.raises(CheckpointError, match=r"gate\.weight: shape is \[8, 64\], expected \[7"):
        inspect(damaged)
