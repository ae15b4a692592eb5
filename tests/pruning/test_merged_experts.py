from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from liveprune.pruning.evaluation.carried_out import carried_out
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.merged_experts import merged_experts
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Lineage, Plan
from tests import reference
from tests.models import FAMILIES


def random_neuron_map(experts: int, ffn: int, new: int, seed: int) -> np.ndarray:
    """Every new neuron has a source; others go anywhere or nowhere."""
    rng = np.random.default_rng(seed)
    neuron_map = rng.integers(-1, new * ffn, (experts, ffn))
    neuron_map[:new] = rng.permutation(new * ffn).reshape(new, ffn)
    return neuron_map


def layers_of(index: int, experts: int, ffn: int) -> dict[str, LayerPlan]:
    rng = np.random.default_rng(index)
    shares = rng.uniform(0.5, 2, experts)
    neuron_map = random_neuron_map(experts, ffn, 4, index)
    merge = np.zeros((4, experts), np.float32)
    merge[np.arange(experts) % 4, np.arange(experts)] = rng.uniform(0.1, 0.9, experts)
    expert_map = tuple(i % 4 for i in range(experts))
    gathered = {"neuron_map": neuron_map, "neuron_shares": shares}
    return {
        "kept": LayerPlan(index, experts, 2, (0, 3, 4, 6)),
        "merge": LayerPlan(index, experts, 2, (0, 3, 4, 6), merge=merge),
        "merge, mapped": LayerPlan(index, experts, 2, merge=merge, expert_map=expert_map),
        "gathered": LayerPlan(index, experts, 2, (0, 3, 4, 6), **gathered),
        "gathered, mapped": LayerPlan(index, experts, 1, expert_map=expert_map, **gathered),
    }


FORMS = tuple(layers_of(0, 8, 4))


@pytest.mark.parametrize("form", FORMS)
def test_equals_a_loop_over_neurons(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(8, 10, 6, generator=generator)
    down = torch.randn(8, 6, 5, generator=generator)
    layer = layers_of(0, 8, 5)[form]
    found = merged_experts(layer, gate_up, down)
    for name, weight, new in zip(
        ("gate_up_proj", "down_proj"), (gate_up, down), found, strict=True
    ):
        if layer.neuron_map is not None:
            expected = reference._gathered(weight, layer, name)
        elif layer.merge is not None:
            expected = torch.tensor(layer.merge) @ weight.flatten(1)
            expected = expected.view(-1, *weight.shape[1:])
        else:
            expected = weight[list(layer.kept)]
        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["merge", "gathered"])
def test_identical_experts_merge_into_that_expert(form: str) -> None:
    """In bfloat16 to the bit: float32 sums are rounded once."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(10, 6, generator=generator).bfloat16().expand(8, 10, 6)
    down = torch.randn(6, 5, generator=generator).bfloat16().expand(8, 6, 5)
    shares = np.random.default_rng(0).uniform(0.1, 3, 8)
    merge = np.zeros((2, 8))
    merge[np.arange(8) % 2, np.arange(8)] = shares
    merge /= merge.sum(axis=1, keepdims=True)
    neuron_map = (np.arange(8) % 2)[:, None] * 5 + np.arange(5)
    layer = {
        "merge": LayerPlan(0, 8, 2, (0, 1), merge=merge),
        "gathered": LayerPlan(0, 8, 2, (0, 1), neuron_map=neuron_map, neuron_shares=shares),
    }[form]
    for weight, new in zip((gate_up, down), merged_experts(layer, gate_up, down), strict=True):
        assert new.dtype == torch.bfloat16
        assert torch.equal(new, weight[:2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_carried_out_equals_the_reference(
    tiny_model: Callable[..., Path], family: str, form: str
) -> None:
    model = tiny_model(family)
    spec = ModelSpec.from_path(model)
    layers = tuple(layers_of(x.index, 8, spec.expert_size)[form] for x in spec.layers)
    if spec.router.groups > 1 and not layers[0].keeps_gate_rows:
        model = tiny_model(family, n_group=1, topk_group=1)
        spec = ModelSpec.from_path(model)
    plan = Plan(family, 3, layers, Lineage("none"))
    ids = torch.arange(20, 60)[None]
    full = reference.load(model)
    with torch.no_grad():
        expected = reference.pruned_model(model, plan)(ids).logits
        before = full(ids).logits
        with carried_out(full, spec, plan):
            found = full(ids).logits
        after = full(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.01
    assert torch.equal(after, before)
