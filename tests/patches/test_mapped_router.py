from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from liveprune.patches.mapped_router import MappedRouter, map_choices
from tests.patches.plain_routing import KINDS, plain_route


def parameter(values: Any, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype), requires_grad=False)


def test_choices_by_hand() -> None:
    """Experts 1 and 3 are gone; 1 answers [1, 0], 3 answers [0, 10]."""
    expert_map = torch.tensor([0, -1, 1, -1, 2], dtype=torch.int32)
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]])
    ids = torch.tensor([[4, 2], [0, 3], [3, 1]], dtype=torch.int32)
    found, rows, added = map_choices(weights, ids, expert_map, torch.tensor([[1.0, 0], [0, 10]]))
    assert found.tolist() == [[0.75, 0.25], [0.5, 0], [0, 0]]
    assert rows.tolist() == [[2, 1], [0, 0], [0, 0]]
    assert rows.dtype == torch.int32
    assert added is not None
    assert added.tolist() == [[0, 0], [0, 5], [0.875, 1.25]]


def test_two_choices_may_have_their_work_done_by_one() -> None:
    weights, ids = torch.tensor([[0.75, 0.25]]), torch.tensor([[2, 0]])
    found, rows, added = map_choices(weights, ids, torch.tensor([1, 0, 1], dtype=torch.int32))
    assert (found.tolist(), rows.tolist(), added) == ([[0.75, 0.25]], [[1, 1]], None)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("constant", [False, True], ids=["tied", "constant"])
def test_every_router_keeps_its_own_choice(name: str, *, constant: bool) -> None:
    """Against a loop in Python's floats, and bit for bit against the router of the base."""
    kind = KINDS[name]
    if kind.scoring == "sigmoid" and not kind.groups:
        pytest.skip("vLLM's CPU router has no plain sigmoid")
    random = np.random.default_rng(1)
    fields = kind.arguments()
    experts = 5
    expert_map = random.permutation(
        [*range(experts), *random.integers(0, experts, kind.experts - 5)]
    )
    if constant:
        expert_map = np.full(kind.experts, -1)
        expert_map[np.sort(random.choice(kind.experts, experts, replace=False))] = range(experts)
    gone = np.flatnonzero(expert_map < 0)
    vectors = torch.from_numpy(random.normal(size=(len(gone), 3))).float() if constant else None
    router = MappedRouter(
        CPURouter(**fields),
        experts,
        parameter(expert_map, torch.int32),
        None if vectors is None else torch.nn.Parameter(vectors, requires_grad=False),
    )
    assert router.routing_method_type == RoutingMethodType.Custom
    logits = torch.from_numpy(random.normal(0, 2, (40, kind.experts))).float()
    weights, rows = router.select_experts(torch.zeros(40, 1), logits, torch.int32)
    own, ids = CPURouter(**fields).select_experts(torch.zeros(40, 1), logits, torch.int32)
    computes = torch.from_numpy(expert_map)[ids.long()] >= 0
    assert torch.equal(weights, own * computes)
    assert torch.equal(rows[computes].long(), torch.from_numpy(expert_map)[ids[computes].long()])
    assert not rows[~computes].any()
    for token in range(len(logits)):
        right = plain_route(kind, logits[token].tolist(), range(kind.experts), kind.top_k)
        for j in range(experts):
            found = weights[token][rows[token] == j].sum()
            expected = sum(w for i, w in right.items() if expert_map[i] == j)
            assert float(found) == pytest.approx(expected, abs=1e-5)
        if vectors is not None:
            assert router.constants is not None
            added = sum(
                (right[i] * v for i, v in zip(gone.tolist(), vectors, strict=True) if i in right),
                torch.zeros(3),
            )
            torch.testing.assert_close(router.constants[token], added, atol=1e-5, rtol=0)
