from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import cut_tree, linkage

from liveprune.pruning.errors import PlanError
from liveprune.pruning.methods import METHODS
from liveprune.pruning.methods.hc_smoe import LINKAGES, clusters
from tests.pruning.methods.folding import fold

# On a line: 0 and 1 are closest, then 2 and 3; 4 is far.
MEANS = [[0.0], [1.0], [10.0], [12.0], [30.0]]


def naive(points: np.ndarray, keep: int, method: str) -> list[list[int]]:
    """All pairs of clusters compared, by all pairs of members; the closest pair becomes one."""
    found = [[i] for i in range(len(points))]

    def distance(one: list[int], other: list[int]) -> float:
        pairs = [
            sum((a - b) ** 2 for a, b in zip(points[i], points[j], strict=True)) ** 0.5
            for i in one
            for j in other
        ]
        return {"average": sum(pairs) / len(pairs), "single": min(pairs), "complete": max(pairs)}[
            method
        ]

    while len(found) > keep:
        one, other = min(itertools.combinations(found, 2), key=lambda pair: distance(*pair))
        found = [x for x in found if x not in (one, other)] + [one + other]
    return sorted(sorted(x) for x in found)


@pytest.mark.parametrize("method", LINKAGES)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31), st.data())
def test_clusters(method: str, count: int, hidden: int, seed: int, data: st.DataObject) -> None:
    points = np.random.default_rng(seed).normal(size=(count, hidden))
    keep = data.draw(st.integers(1, count))
    found = clusters(points, keep, method)
    assert found == naive(points, keep, method)
    assert len(found) == keep
    if count > 1:
        labels = cut_tree(linkage(points, method), n_clusters=keep)[:, 0]
        assert found == sorted(np.flatnonzero(labels == x).tolist() for x in range(keep))


def test_equal_points_still_give_exactly_as_many() -> None:
    """A cut at a height cannot tell joins of one height apart."""
    for keep in range(1, 6):
        assert len(clusters(np.zeros((5, 2)), keep, "average")) == keep


def test_linkages_differ() -> None:
    """2 is nearer to 1 than to 3; on average 3 is nearer, as 0 pulls the first cluster away."""
    points = np.array([[0.0], [2.0], [4.4], [7.2]])
    assert clusters(points, 2, "single") == [[0, 1, 2], [3]]
    assert clusters(points, 2, "average") == [[0, 1], [2, 3]]


def test_by_hand() -> None:
    layer = fold("hc-smoe", [1, 3, 2, 2, 0], [1, 2, 3], dense_sums=MEANS)
    # The most frequent of each cluster lends its gate row; of equal ones the first.
    assert (layer.layer, layer.kept) == (4, (1, 2, 4))
    expected = [[0.25, 0.75, 0, 0, 0], [0, 0, 0.5, 0.5, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(layer.merge, expected)


def test_gate_rows_may_stay() -> None:
    layer = fold("hc-smoe", [1, 3, 2, 2, 0], [1, 2, 3], dense_sums=MEANS, keep_gate_rows=True)
    assert (layer.kept, layer.expert_map) == ((), (0, 0, 1, 1, 2))
    # New experts stand in the order of the rows that represent them.
    far = [*MEANS[4:], *MEANS[:4]]
    layer = fold("hc-smoe", [0, 1, 3, 2, 2], [1, 2, 3], dense_sums=far, keep_gate_rows=True)
    assert layer.expert_map == (0, 1, 1, 2, 2)


def test_what_was_never_hit_counts_the_same() -> None:
    layer = fold("hc-smoe", [0, 0, 0, 4, 1], [1, 2, 3], dense_sums=MEANS)
    assert layer.kept == (0, 3, 4)
    expected = [[0.5, 0.5, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(layer.merge, expected)


def test_groups_of_the_router_are_clustered_apart_unless_rows_stay() -> None:
    """Experts 0 to 2 and 3 to 5; 2 and 3 are the closest."""
    means = [[0.0], [5.0], [9.0], [9.5], [20.0], [26.0]]
    found = {
        stay: fold(
            "hc-smoe", [1] * 6, [0, 1, 3, 4], dense_sums=means, groups=2, keep_gate_rows=stay
        )
        for stay in (False, True)
    }
    assert found[False].kept == (0, 1, 3, 4)
    assert found[False].merge is not None
    assert (found[False].merge > 0).tolist()[1] == [False, True, True, False, False, False]
    assert found[True].expert_map == (0, 1, 1, 1, 2, 3)


def test_super_experts_stay_alone() -> None:
    layer = fold("hc-smoe", [1, 3, 2, 2, 0], [0, 1, 3], dense_sums=MEANS, protected=[0])
    assert layer.merge is not None
    assert layer.merge[0].tolist() == [1, 0, 0, 0, 0]
    assert layer.kept == (0, 1, 4)
    with pytest.raises(PlanError, match=r"layer 4: keeps only its super experts \[0, 1\]"):
        fold("hc-smoe", [1] * 5, [0, 1], dense_sums=MEANS, protected=[0, 1])


def test_unknown_linkages_are_refused() -> None:
    with pytest.raises(PlanError, match="linkage is 'ward', expected one of average, single"):
        METHODS["hc-smoe"].with_options({"linkage": "ward"})
