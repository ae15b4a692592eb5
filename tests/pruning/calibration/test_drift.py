from __future__ import annotations

import math

import numpy as np
import pytest

from liveprune.pruning.calibration.drift import divergence, drift, expected_usage
from liveprune.pruning.calibration.statistics import LayerStatistics, RoutingStatistics
from liveprune.pruning.plan import LayerPlan, Lineage, Plan


def plain_divergence(one: list[float], other: list[float]) -> float:
    """By the definition, in a loop over entropies."""
    p = [x / sum(one) for x in one]
    q = [x / sum(other) for x in other]

    def entropy(values: list[float]) -> float:
        return -sum(x * math.log2(x) for x in values if x)

    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return entropy(middle) - (entropy(p) + entropy(q)) / 2


@pytest.mark.parametrize(
    ("one", "other"),
    [([1.0, 2, 3, 0], [3.0, 2, 0, 5]), ([5.0, 1], [50.0, 10]), ([7.0, 0, 1], [0.1, 0, 9])],
)
def test_is_the_difference_of_entropies(one: list[float], other: list[float]) -> None:
    found = divergence(np.array(one), np.array(other))
    assert found == pytest.approx(plain_divergence(one, other), abs=1e-12)
    assert found == pytest.approx(divergence(np.array(other), np.array(one)))


def test_from_equal_to_disjoint() -> None:
    assert divergence(np.array([2.0, 6, 0]), np.array([1.0, 3, 0])) == 0
    assert divergence(np.array([1.0, 0]), np.array([0, 4.0])) == 1


COUNTS = np.array([4.0, 0, 6, 10])


def test_what_a_plan_makes_of_the_counts() -> None:
    sliced = LayerPlan(layer=0, experts=4, kept=(0, 3), top_k=1)
    found = expected_usage(sliced, COUNTS)
    assert found is not None
    assert found.tolist() == [4, 0, 0, 10]
    vectors = np.zeros((2, 3), np.float32)
    constant = LayerPlan(layer=0, experts=4, kept=(0, 3), top_k=1, constants=vectors)
    found = expected_usage(constant, COUNTS)
    assert found is not None
    assert found.tolist() == [4, 0, 6, 10]
    merge = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], np.float32)
    tied = LayerPlan(layer=0, experts=4, merge=merge, expert_map=(0, 0, 1, 1), top_k=2)
    found = expected_usage(tied, COUNTS)
    assert found is not None
    assert found.tolist() == [4, 16]
    merged = LayerPlan(layer=0, experts=4, kept=(0, 2), merge=merge, top_k=2)
    found = expected_usage(merged, COUNTS)
    assert found is not None
    assert found.tolist() == [4, 6]
    mapped = LayerPlan(layer=0, experts=4, merge=merge, router_map=merge, top_k=1)
    assert expected_usage(mapped, COUNTS) is None


def test_only_layers_that_can_be_compared() -> None:
    def layer(counts: list[float]) -> LayerStatistics:
        sums = np.zeros((4, 3, 3))
        sums[:, 0, 0] = counts
        return LayerStatistics(sums, np.zeros(4), np.zeros(4))

    merge = np.eye(4, dtype=np.float32)[:2]
    layers = (
        LayerPlan(layer=1, experts=4, kept=(0, 2), top_k=1),
        LayerPlan(layer=2, experts=4, kept=(0, 1), top_k=1),
        LayerPlan(layer=3, experts=4, merge=merge, router_map=merge, top_k=1),
        LayerPlan(layer=4, experts=4, kept=(0, 1), top_k=1),
    )
    plan = Plan("mixtral", 5, layers, Lineage("test"), "")
    statistics = {1: layer([4, 0, 6, 10]), 2: layer([0, 0, 6, 10]), 3: layer([1] * 4)}
    live = {index: np.array([1.0, 0, 9, 0]) for index in range(6)}
    found = drift(plan, RoutingStatistics(statistics, 10, "", ""), live)
    assert set(found) == {1}
    assert found[1] == pytest.approx(plain_divergence([4, 0, 6, 0], [1, 0, 9, 0]))
