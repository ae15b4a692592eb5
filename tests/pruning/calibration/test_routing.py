"""Routing under a kept set against the families' own gates with their rows sliced."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from liveprune.pruning.calibration.routing import sliced_routing
from liveprune.pruning.model_spec import ModelSpec, Router

CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen3_moe", {}),
    ("olmoe", {"num_experts_per_tok": 3}),
    ("deepseek_v2", {"routed_scaling_factor": 2.5}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    ("deepseek_v3", {"n_group": 2, "topk_group": 1}),
    ("deepseek_v3", {"n_group": 2, "topk_group": 2, "norm_topk_prob": False}),
]
WHOLE = tuple(range(8))


def sets_of(spec: ModelSpec) -> list[tuple[int, ...]]:
    """All sets of 4 and 6 experts that the router's groups allow, and the whole."""
    size = 8 // spec.router.groups
    sets = [x for keep in (4, 6) for x in itertools.combinations(range(8), keep)]
    per_group = [[sum(i // size == g for i in x) for g in range(spec.router.groups)] for x in sets]
    return [WHOLE, *(x for x, n in zip(sets, per_group, strict=True) if len(set(n)) == 1)]


@torch.no_grad()
def stock(gate: Any, kept: tuple[int, ...], top_k: int, x: torch.Tensor) -> torch.Tensor:
    """The gate module with the rows sliced; [tokens, 8] weights of the old experts."""
    before = dict(gate.named_parameters()) | dict(gate.named_buffers())
    rows = list(kept)
    gate.num_experts, gate.top_k = len(kept), top_k
    gate.weight = torch.nn.Parameter(before["weight"][rows])
    if "e_score_correction_bias" in before:
        gate.e_score_correction_bias = before["e_score_correction_bias"][rows]
    _, weights, ids = gate(x)
    for name, value in before.items():
        setattr(gate, name, value)
    old = torch.tensor(rows)[ids]
    return torch.zeros(len(x), 8).scatter_(1, old, weights)


@pytest.mark.parametrize(("family", "overrides"), CASES)
@pytest.mark.parametrize("lowered", [False, True])
def test_equals_the_sliced_gate(
    tiny_model: Callable[..., Path], family: str, overrides: dict[str, Any], lowered: bool
) -> None:
    model = tiny_model(family, **overrides)
    spec = ModelSpec.from_path(model)
    top_k = 1 if lowered else spec.layers[0].top_k
    gate = AutoModelForCausalLM.from_pretrained(model).model.layers[-1].mlp.gate
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    logits = x @ gate.weight.detach().T
    bias = dict(gate.named_buffers()).get("e_score_correction_bias")
    sets = sets_of(spec)
    masks = torch.zeros(len(sets), 8, dtype=torch.bool)
    for place, kept in enumerate(sets):
        masks[place, list(kept)] = True
    found = sliced_routing(logits, masks, spec.router, top_k, bias)
    assert found.shape == (len(sets), 50, 8)
    assert found.dtype == torch.float32
    for kept, weights, mask in zip(sets, found, masks, strict=True):
        torch.testing.assert_close(weights, stock(gate, kept, top_k, x), rtol=1e-5, atol=1e-6)
        alone = sliced_routing(logits, mask, spec.router, top_k, bias)
        torch.testing.assert_close(weights, alone, rtol=1e-6, atol=1e-7)


def test_by_hand() -> None:
    """Scores 4, 2, 1, 1 of 8; without the first: 1/2, 1/4, 1/4 before, 2/3 and 1/3 after top-2."""
    logits = torch.tensor([[4.0, 2.0, 1.0, 0.99]]).log()
    kept = torch.tensor([False, True, True, True])
    plain = sliced_routing(logits, kept, Router("softmax", renormalise=False), 2)
    torch.testing.assert_close(plain, torch.tensor([[0, 2, 1, 0.0]]) / 3.99)
    shared = sliced_routing(logits, kept, Router("softmax", renormalise=True, scale=3.0), 2)
    torch.testing.assert_close(shared, torch.tensor([[0, 2, 1, 0.0]]))


def test_the_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.zeros(1, 4)
    router = Router("sigmoid", renormalise=False)
    bias = torch.tensor([0.3, 0.0, 0.2, 0.1])
    found = sliced_routing(logits, torch.tensor([False, True, True, True]), router, 2, bias)
    torch.testing.assert_close(found, torch.tensor([[0, 0, 0.5, 0.5]]))


def test_groups_may_keep_other_numbers() -> None:
    """Group 0 keeps one expert, group 1 all: the best expert's group is the one that counts."""
    router = Router("softmax", renormalise=True, groups=2, top_groups=1)
    logits = torch.tensor([[9.0, 3.0, 2.0, 1.0], [9.0, 0.0, 2.0, 1.0]])
    kept = torch.tensor([False, True, True, True])
    found = sliced_routing(logits, kept, router, 1)
    assert found.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
