"""Mapped and constant experts and merges neuron by neuron, against a loop over tokens in float64.

Sliced gates, merges and router maps: test_transformers_engine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liveprune.pruning.evaluation.carried_out import carried_out
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from tests import reference
from tests.checkpoints import logits
from tests.forms import FORMS, form_plan
from tests.models import FAMILIES
from tests.token_loop import looped_model

Family = Callable[..., Path]
GROUPS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "deepseek_v3": {"n_group": 2, "topk_group": 1},
}


def run(model: Any, base: Path, plan: Plan | None) -> torch.Tensor:
    with carried_out(model, ModelSpec.from_path(base), plan):
        return logits(model)


def plan_of(base: Path, layer: Callable[[int], LayerPlan]) -> Plan:
    spec = ModelSpec.from_path(base)
    layers = tuple(layer(x.index) for x in spec.layers)
    return Plan(spec.architecture.model_type, spec.num_hidden_layers, layers, Lineage("test"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_equals_a_loop_over_tokens(family: str, form: str, tiny_model: Family) -> None:
    """Fewer active experts in the last layer; the full model comes back."""
    base = tiny_model(family, **GROUPS.get(family, {}))
    plan = form_plan(base, form, top_k=1)
    model = reference.load(base)
    full = logits(model)
    actual = run(model, base, plan)
    expected = logits(looped_model(base, plan))
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(actual, full, atol=1e-2)
    assert torch.equal(run(model, base, None), full)


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_choices_that_meet_in_one_expert_add_up(way: str, tiny_model: Family) -> None:
    """Eight equal experts, all done by one: transformers' every way of running experts."""
    base = tiny_model("mixtral")
    model = reference.load(base)
    model.set_experts_implementation(way)
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight.data[:] = weight.data[:1].clone()
    full = logits(model)
    one = np.eye(1, 8, 3, dtype=np.float32)
    plan = plan_of(base, lambda i: LayerPlan(i, 8, 2, merge=one, expert_map=(0,) * 8))
    torch.testing.assert_close(run(model, base, plan), full, rtol=0, atol=2e-5)


def test_constants_of_zero_drop_the_contribution(tiny_model: Family) -> None:
    """Not renormalised: the same as experts whose down matrix is zero."""
    base = tiny_model("qwen2_moe")
    kept = (1, 2, 5)
    zeros = np.zeros((5, 64), np.float32)
    plan = plan_of(base, lambda i: LayerPlan(i, 8, 2, kept, constants=zeros))
    model = reference.load(base)
    actual = run(model, base, plan)
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data[[0, 3, 4, 6, 7]] = 0
    torch.testing.assert_close(actual, logits(model), rtol=0, atol=1e-5)


def test_neurons_in_another_order_compute_the_same(tiny_model: Family) -> None:
    base = tiny_model("olmoe")
    size = ModelSpec.from_path(base).expert_size
    rng = np.random.default_rng(3)
    neuron_map = np.arange(8)[:, None] * size + [rng.permutation(size) for _ in range(8)]

    def layer(index: int) -> LayerPlan:
        ids = tuple(range(8))
        return LayerPlan(index, 8, 2, ids, neuron_map=neuron_map, neuron_shares=np.ones(8))

    model = reference.load(base)
    full = logits(model)
    before = model.model.layers[0].mlp.experts.down_proj.data.clone()
    with carried_out(model, ModelSpec.from_path(base), plan_of(base, layer)):
        after = model.model.layers[0].mlp.experts.down_proj.data
        moved = neuron_map[4] % size
        assert torch.equal(after[4][:, moved], before[4])
        torch.testing.assert_close(logits(model), full, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_aligned_merge_of_copies_restores_the_expert(
    dtype: torch.dtype, tiny_model: Family
) -> None:
    """Experts 4..7 are 0..3 with their neurons in another order; merged in pairs."""
    base = tiny_model("mixtral")
    model = reference.load(base).to(dtype)
    size = ModelSpec.from_path(base).expert_size
    order = np.random.default_rng(5).permutation(size)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        gate_up = experts.gate_up_proj.data.view(8, 2, size, -1)
        gate_up[4:] = gate_up[:4][:, :, order]
        experts.down_proj.data[4:] = experts.down_proj.data[:4][:, :, order]
    rows = np.arange(4)[:, None] * size
    neuron_map = np.concatenate([rows + np.arange(size), rows + order])

    def layer_plan(index: int) -> LayerPlan:
        return LayerPlan(
            index,
            8,
            2,
            expert_map=(0, 1, 2, 3) * 2,
            neuron_map=neuron_map,
            neuron_shares=np.ones(8),
        )

    experts = model.model.layers[1].mlp.experts
    originals = [experts.gate_up_proj.data[:4].clone(), experts.down_proj.data[:4].clone()]
    with carried_out(model, ModelSpec.from_path(base), plan_of(base, layer_plan)):
        for found, original in zip(_weights(experts), originals, strict=True):
            assert torch.equal(found, original)


def _weights(experts: Any) -> Sequence[torch.Tensor]:
    return experts.gate_up_proj.data, experts.down_proj.data


@pytest.mark.parametrize("form", ["merge+map", "neurons+map"])
def test_merges_are_rounded_once(form: str, tiny_model: Family) -> None:
    """bfloat16 weights are those of the float32 model, rounded."""
    base = tiny_model("deepseek_v3", dtype="bfloat16")
    plan = form_plan(base, form)
    spec = ModelSpec.from_path(base)
    wide = reference.load(base)
    narrow = reference.load(base).to(torch.bfloat16)
    with carried_out(wide, spec, plan), carried_out(narrow, spec, plan):
        pairs = [x.model.layers[1].mlp.experts for x in (wide, narrow)]
        for a, b in zip(*(_weights(x) for x in (p._experts for p in pairs)), strict=True):
            assert torch.equal(a.bfloat16(), b)


def test_constants_are_added_in_float32(tiny_model: Family) -> None:
    """A block in bfloat16: kept experts' output plus exact vectors, rounded once."""
    base = tiny_model("mixtral")
    vectors = np.random.default_rng(1).normal(size=(7, 64)).astype(np.float32)
    plan = plan_of(base, lambda i: LayerPlan(i, 8, 2, (6,), constants=vectors))
    model = reference.load(base).bfloat16()
    block = model.model.layers[0].mlp
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad(), carried_out(model, ModelSpec.from_path(base), plan):
        _, weights, ids = block.gate(x)
        found = block(x)[0]
        experts = block.experts._experts
        only = (ids == 6).any(1)
        kept = experts(x[0], torch.zeros_like(ids), weights.masked_fill(ids != 6, 0))
    table = torch.zeros(8, 64)
    table[[0, 1, 2, 3, 4, 5, 7]] = torch.tensor(vectors)
    added = (weights.float()[:, :, None] * table[ids]).sum(1)
    assert only.any()
    assert not only.all()
    torch.testing.assert_close(found, (kept.float() + added).bfloat16(), rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(found[~only].float(), added[~only], rtol=2**-8, atol=1e-6)
