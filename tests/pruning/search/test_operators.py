from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from liveprune.pruning.plan_guards import check_plan
from liveprune.pruning.search import operators
from liveprune.pruning.search.candidate import Candidate
from liveprune.pruning.search.genome import Genome, Space, make_space, one_hot, picked
from liveprune.pruning.search.operators import (
    initial,
    merge_child,
    normalised,
    parent_pool,
    prune_child,
)
from liveprune.pruning.search.presets import Settings
from tests.pruning.search.fakes import candidate, spec_of


class Scripted:
    """A generator whose ``random`` and ``integers`` come from a list, in order."""

    def __init__(self, *numbers: Any) -> None:
        self.numbers = list(numbers)

    def random(self, size: Any = None) -> Any:
        drawn = self.numbers.pop(0)
        return drawn if size is None else np.broadcast_to(np.array(drawn, float), size).copy()

    def integers(self, high: int) -> int:
        drawn = int(self.numbers.pop(0))
        assert drawn < high
        return drawn

    def standard_normal(self, size: Any) -> Any:
        return self.random(size)

    def choice(self, high: int, count: int, *, replace: bool) -> list[int]:
        drawn = self.numbers.pop(0)
        assert len(drawn) == count
        assert max(drawn) < high
        return list(drawn)


def pruned(space: Space, index: int, mean: float, *ids: list[int], **state: Any) -> Candidate:
    rows = tuple(one_hot(row, group.experts) for row, group in zip(ids, space.groups, strict=True))
    return candidate(space, Genome(rows, rows), index, mean, **state)


ONE = make_space(spec_of(layers=1), Settings(), experts=2)


def test_a_touched_row_takes_a_free_expert() -> None:
    parent = pruned(ONE, 0, 0.5, [0, 2])
    # touched; no tie to shuffle; parent 0; row 1 fires; of the free ones (1, 3) the second
    rng = Scripted([0.2], [0.5], [0], [0.5, 0.1], 1)
    child = prune_child(ONE, Settings(), [parent], rng)  # type: ignore[arg-type]
    assert child.merge[0].argmax(axis=1).tolist() == [0, 3]
    assert picked(child.merge[0], child.router_map[0]) == (0, 3)


def test_pruning_crossover_by_rows_keeps_experts_distinct() -> None:
    settings = Settings(crossover_in_prune=True, crossover_prob=1.0)
    parents = [pruned(ONE, 0, 0.5, [0, 2]), pruned(ONE, 1, 0.4, [2, 3])]
    # Row 0 from the second parent (2), row 1 from the first: 2 again, so the second's 3.
    rng = Scripted([0.1], 0.0, [0.5, 0.5], [0, 1], [0.9, 0.1], [0.9, 0.9])
    child = prune_child(ONE, settings, parents, rng)  # type: ignore[arg-type]
    assert child.merge[0].argmax(axis=1).tolist() == [2, 3]


def test_crossover_falls_back_to_a_free_expert() -> None:
    # Rows 0 and 1 of the child are 1 and 0; both parents' row 2 is among them.
    rng = Scripted([0.9, 0.1, 0.1], 1)
    child = operators._cross_ids(
        [2, 0, 1],
        [1, 3, 0],
        5,
        Settings(),
        rng,  # type: ignore[arg-type]
        by_row=True,
    )
    assert child == [1, 0, 3]  # free are 2, 3, 4


def test_merge_child_by_hand() -> None:
    settings = Settings(crossover_prob=1.0, norm_prob=0.0, scale=0.1)
    first = np.array([[1, 0, 0, 0], [0, 1, 0, 0]], np.float32)
    second = np.array([[0, 0, 1, 0], [0, 0, 0, 1]], np.float32)
    parents = [
        candidate(ONE, Genome((matrix,), (matrix,)), i, 0.5)
        for i, matrix in enumerate((first, second))
    ]
    rng = Scripted(
        [0.1],  # W_EM is touched
        [0.9],  # W_RM is not
        0.0,  # crossover
        [0.3, 0.6],  # ties
        [0, 1],  # parents
        [[0.7], [0.2]],  # W_EM: row 0 of the second, row 1 of the first
        [[0.7]],  # W_RM: the second's as a whole
        [[0.1, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.2]],  # elements that change
        [[2, 9, 9, 9], [9, 9, 9, -3]],  # by so much
        0.5,  # no normalisation
    )
    child = merge_child(ONE, settings, parents, rng)  # type: ignore[arg-type]
    assert not rng.numbers
    expected = np.array([[0.2, 0, 1, 0], [0, 1, 0, -0.3]], np.float32)
    np.testing.assert_allclose(child.merge[0], expected, atol=1e-7)
    assert child.merge[0].dtype == np.float32
    assert np.array_equal(child.router_map[0], second)


def test_rows_that_sum_to_about_nothing_are_not_normalised() -> None:
    matrix = np.array([[1.5, 0.5], [0.5, -0.49], [-1.0, 0.5]], np.float32)
    expected = [[0.75, 0.25], [0.5, -0.49], [2.0, -1.0]]
    np.testing.assert_allclose(normalised(matrix), expected, rtol=1e-6)
    assert np.array_equal(normalised(np.zeros((2, 2), np.float32)), np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("means", "crossing", "expected"),
    [
        # Within 3 points of 0.50, and one more.
        ([0.46, 0.50, 0.471, 0.47, 0.3], False, {0, 1, 2, 3}),
        ([0.5, 0.3, 0.2], False, {0, 1}),
        # Within 1 point of 0.50, at least 6.
        ([0.5, 0.3, 0.2], True, {0, 1, 2}),
        ([0.5, 0.1, 0.2, 0.3, 0.4, 0.45, 0.46], True, {0, 2, 3, 4, 5, 6}),
        ([0.5] * 8 + [0.4], True, set(range(8))),
    ],
)
def test_parents_by_threshold_and_rank(
    means: list[float], crossing: bool, expected: set[int]
) -> None:
    population = [pruned(ONE, i, mean, [0, 1]) for i, mean in enumerate(means)]
    rng = np.random.default_rng(0)
    pool = parent_pool(population, Settings(), rng, crossing=crossing)
    assert {x.index for x in pool} == expected
    assert pool[0].index == means.index(max(means)) or means.count(max(means)) > 1


def test_ties_are_shuffled() -> None:
    population = [pruned(ONE, i, 0.5, [0, 1]) for i in range(5)]
    firsts = {
        parent_pool(population, Settings(), np.random.default_rng(i), crossing=True)[0].index
        for i in range(60)
    }
    assert firsts == set(range(5))


def test_dropped_and_failed_candidates_are_parents_of_last_resort() -> None:
    population = [
        pruned(ONE, 0, 0.9, [0, 1], failure="NaN"),
        pruned(ONE, 1, 0.9, [0, 1], dropped=True),
        pruned(ONE, 2, 0.1, [0, 1]),
    ]
    rng = np.random.default_rng(0)
    alone = parent_pool(population, Settings(), rng, crossing=False)
    assert [x.index for x in alone] == [2]
    pair = parent_pool(population, Settings(), rng, crossing=True)
    assert [x.index for x in pair] == [2, 1]
    assert [x.index for x in parent_pool(population[:1], Settings(), rng, crossing=False)] == [0]


SPACES = {
    "plain": make_space(spec_of(6, layers=3), Settings(), experts=[4, 6, 2]),
    "literal": make_space(spec_of(5, family="qwen2_moe"), Settings(), experts=3),
    "grouped": make_space(spec_of(8, family="deepseek_v3"), Settings(merge=False), experts=4),
}


@pytest.mark.parametrize("name", SPACES)
@given(seed=st.integers(0, 2**32), crossing=st.booleans())
@hypothesis_settings(max_examples=60, deadline=None)
def test_pruned_children_are_prunings_that_can_be_served(
    name: str, seed: int, crossing: bool
) -> None:
    space = SPACES[name]
    settings = Settings(
        crossover_in_prune=crossing, crossover_prob=0.7, row_mutate_prob=0.4, weight_change_prob=0.6
    )
    rng = np.random.default_rng(seed)
    population = [candidate(space, initial(space, rng), i, float(rng.random())) for i in range(4)]
    for i in range(4, 16):
        child = prune_child(space, settings, population, rng)
        for group, merge, router_map in zip(
            space.groups, child.merge, child.router_map, strict=True
        ):
            kept = picked(merge, router_map)
            assert kept is not None
            assert len(kept) == group.kept
            routers = space.spec.router.groups
            counts = np.bincount(np.array(kept) // (group.experts // routers), minlength=routers)
            assert len(set(counts.tolist())) == 1
        check_plan(space.plan(child), space.spec)
        population.append(candidate(space, child, i, float(rng.random())))


@given(seed=st.integers(0, 2**32))
@hypothesis_settings(max_examples=60, deadline=None)
def test_merged_children_differ_from_their_parents_and_can_be_served(seed: int) -> None:
    space = SPACES["plain"]
    rng = np.random.default_rng(seed)
    population = [candidate(space, initial(space, rng), i, float(rng.random())) for i in range(3)]
    before = [[m.copy() for m in (*x.genome.merge, *x.genome.router_map)] for x in population]
    for i in range(3, 10):
        child = merge_child(space, Settings(), population, rng)
        plan = space.plan(child)
        check_plan(plan, space.spec)
        assert [m.shape for m in child.merge] == [(4, 6), (6, 6), (2, 6)]
        assert all(m.dtype == np.float32 for m in (*child.merge, *child.router_map))
        population.append(candidate(space, child, i, float(rng.random())))
    for x, matrices in zip(population, before, strict=False):
        for m, old in zip((*x.genome.merge, *x.genome.router_map), matrices, strict=True):
            assert np.array_equal(m, old)
