from __future__ import annotations

import math

import pytest
import torch
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType

from liveprune.patches.router_map import RouterMapRouter, route
from liveprune.pruning.plan import SMALLEST_SUM


def plain_route(
    logits: list[float], router_map: list[list[float]], top_k: int, *, renormalise: bool
) -> tuple[list[float], list[int]]:
    """One token, by the definition, in Python's floats."""
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    probabilities = [x / math.fsum(powers) for x in powers]
    scores = [
        math.fsum(r * p for r, p in zip(row, probabilities, strict=True)) for row in router_map
    ]
    ids = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:top_k]
    weights = [scores[j] for j in ids]
    total = math.fsum(weights)
    if renormalise:
        weights = [w / (total if abs(total) >= SMALLEST_SUM else SMALLEST_SUM) for w in weights]
    return weights, ids


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.26, 1.0), (-1.0, -0.1)])
@pytest.mark.parametrize(("experts", "width", "top_k"), [(5, 8, 2), (8, 8, 3), (1, 8, 1)])
def test_equals_a_plain_loop(
    experts: int, width: int, top_k: int, low: float, high: float, *, renormalise: bool
) -> None:
    """Maps below zero throughout give negative sums: the weights come out positive all the same."""
    generator = torch.Generator().manual_seed(experts)
    logits = 3 * torch.randn(50, width, generator=generator)
    router_map = low + (high - low) * torch.rand(experts, width, generator=generator)
    weights, ids = route(logits, router_map, top_k, renormalise=renormalise)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    for row in range(len(logits)):
        right, right_ids = plain_route(
            logits[row].tolist(), router_map.tolist(), top_k, renormalise=renormalise
        )
        found = dict(zip(ids[row].tolist(), weights[row].tolist(), strict=True))
        assert found == pytest.approx(dict(zip(right_ids, right, strict=True)), rel=1e-4, abs=1e-6)


def test_worked_example() -> None:
    """p = (1/2, 1/4, 1/4); scores = (1/4 - 1/4, 1/2 + 1/8, -1/2); the two best sum to 5/8."""
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0]])
    router_map = torch.tensor([[0.5, -1.0, 0.0], [1.0, 0.0, 0.5], [-1.0, 0.0, 0.0]])
    weights, ids = route(logits, router_map, 2, renormalise=True)
    assert ids.tolist() == [[1, 0]]
    assert weights[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    weights, _ = route(logits, router_map, 3, renormalise=False)
    assert weights[0].tolist() == pytest.approx([0.625, 0.0, -0.5], abs=1e-6)


def test_signs_are_kept_by_a_negative_sum() -> None:
    """Scores (-0.1, -0.3): weights 1/4 and 3/4."""
    weights, ids = route(
        torch.zeros(1, 2), torch.tensor([[-0.1, -0.1], [-0.3, -0.3]]), 2, renormalise=True
    )
    assert dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True)) == pytest.approx(
        {0: 0.25, 1: 0.75}
    )


@pytest.mark.parametrize("tiny", [0.0, 1e-12, -1e-12])
def test_sums_near_zero_stay_finite(tiny: float) -> None:
    router_map = torch.tensor([[1.0, 1.0], [-1.0, -1.0 + tiny]])
    weights, _ = route(torch.zeros(1, 2), router_map, 2, renormalise=True)
    assert torch.isfinite(weights).all()
    weights, _ = route(torch.zeros(1, 2), torch.full((2, 2), tiny), 2, renormalise=True)
    assert torch.isfinite(weights).all()


def test_ties_take_different_experts() -> None:
    """Four equal scores, three taken: any three, one third each."""
    weights, ids = route(torch.zeros(6, 4), torch.eye(4), 3, renormalise=True)
    for row in ids.tolist():
        assert len(set(row)) == 3
        assert set(row) <= {0, 1, 2, 3}
    assert weights.flatten().tolist() == pytest.approx([1 / 3] * 18)


def test_one_hot_map_selects_as_the_softmax_does() -> None:
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    kept = [0, 2, 5]
    weights, ids = route(logits, torch.eye(6)[kept], 2, renormalise=False)
    best = torch.softmax(logits, -1)[:, kept].topk(2)
    assert torch.equal(ids.long(), best.indices)
    torch.testing.assert_close(weights, best.values)


def test_half_precision_logits_are_widened_first() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 8, generator=generator).bfloat16()
    router_map = torch.rand(5, 8, generator=generator)
    narrow = route(logits, router_map, 2, renormalise=True)
    wide = route(logits.float(), router_map, 2, renormalise=True)
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[1], wide[1])


def test_router_for_vllm() -> None:
    """Scaled weights, the id type that the kernel asks for, and the map as it is at the moment."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 8, generator=generator)
    router_map = torch.nn.Parameter(torch.zeros(5, 8), requires_grad=False)
    router = RouterMapRouter(2, 5, renormalise=True, scale=2.5, router_map=router_map)
    router_map.copy_(torch.rand(5, 8, generator=generator))  # as the loader does, after building
    weights, ids = router.select_experts(torch.zeros(7, 4), logits, torch.int64)
    right, right_ids = route(logits, router_map, 2, renormalise=True)
    torch.testing.assert_close(weights, right * 2.5)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, right_ids.long())
    assert weights.is_contiguous()
    assert ids.is_contiguous()
    assert router.routing_method_type is RoutingMethodType.Custom
