"""Bytes from headers are those of the checkpoint that is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint
from liveprune.pruning.memory_target import costs_of
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.pareto.resident import ModelBytes
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.prune import make_plan

MakeModel = Callable[..., Path]


def written(model: Path, plan: Plan, folder: Path) -> int:
    apply_plan(model, plan, folder)
    return sum(entry.size for entry in read_checkpoint(folder).tensors.values())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_sliced(tiny_model: MakeModel, tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    spec = ModelSpec.from_path(model)
    sizes = ModelBytes(model, spec)
    checkpoint = read_checkpoint(model)
    assert sizes.of(None).total == sum(entry.size for entry in checkpoint.tensors.values())
    experts = 8 if family == "deepseek_v3" else 5
    plan = make_plan(model, method="random", experts=experts)
    assert sizes.of(plan).total == written(model, plan, tmp_path / "out")


def test_mapped_and_constant(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    spec = ModelSpec.from_path(model)
    merge = np.full((2, 8), 0.125)
    layers = (
        LayerPlan(0, 8, 2, merge=merge, router_map=merge),
        LayerPlan(1, 8, 2, kept=(1, 2, 5), constants=np.ones((5, spec.hidden_size))),
        LayerPlan(2, 8, 2, merge=merge, expert_map=(0, 1) * 4),
    )
    plan = Plan("mixtral", 3, layers, Lineage("test"))
    found = ModelBytes(model, spec).of(plan)
    # A live map is a row of the routing tables, twice as wide as the checkpoint's; and the
    # checkpoint of constants holds a map beside them.
    written_maps = 4 * (16 + 5 * spec.hidden_size + 8 + 8)
    assert found.maps == 4 * (16 + 5 * spec.hidden_size) + 8 * 8
    total = written(model, plan, tmp_path / "out")
    assert found.total - found.maps == total - written_maps


@pytest.mark.parametrize("kept", [2, 5, 8])
def test_costs_of_a_budget_are_those_of_its_checkpoint(
    tiny_model: MakeModel, tmp_path: Path, kept: int
) -> None:
    model = tiny_model("qwen2_moe")
    spec = ModelSpec.from_path(model)
    counts = {layer.index: kept for layer in spec.layers}
    plan = make_plan(model, method="random", experts=kept)
    assert costs_of(model, spec).bytes_of(counts) == written(model, plan, tmp_path / "sliced")
    vectors = np.ones((8 - kept, spec.hidden_size))
    layers = tuple(
        LayerPlan(x.layer, 8, 2, x.kept, constants=vectors if kept < 8 else None)
        for x in plan.layers
    )
    constant = Plan("qwen2_moe", 3, layers, Lineage("test"))
    costs = costs_of(model, spec, constants=True)
    assert costs.bytes_of(counts) == written(model, constant, tmp_path / "constant")
