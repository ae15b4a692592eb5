"""Searches over sets of experts against plain loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from liveprune.pruning.methods.expert_sets import (
    ScoredSet,
    SetSpace,
    eliminate,
    enumerate_sets,
    masks,
    score_sets,
)

Values = npt.NDArray[np.float64]


class Pairs:
    """The loss of a set: for each pair of experts that both went, its entry in a random matrix."""

    def __init__(self, experts: int, seed: int) -> None:
        self.matrix = np.random.default_rng(seed).random((experts, experts))
        self.asked: list[tuple[int, ...]] = []

    def of(self, kept: tuple[int, ...]) -> float:
        gone = [i for i in range(len(self.matrix)) if i not in kept]
        return float(sum(self.matrix[i, j] for i in gone for j in gone))

    def __call__(self, kept: torch.Tensor) -> Values:
        sets = [tuple(np.flatnonzero(row).tolist()) for row in kept.numpy()]
        self.asked += sets
        return np.array([self.of(x) for x in sets])


@pytest.mark.parametrize(("experts", "keep", "groups"), [(7, 3, 1), (8, 4, 2), (6, 6, 1)])
def test_all_sets(experts: int, keep: int, groups: int) -> None:
    space = SetSpace(experts, keep, groups)
    size = experts // groups
    expected = [
        x
        for x in itertools.combinations(range(experts), keep)
        if {sum(i // size == g for i in x) for g in range(groups)} == {keep // groups}
    ]
    assert sorted(space.all()) == expected
    assert space.count == len(expected)


@pytest.mark.parametrize(("experts", "keep", "groups"), [(11, 5, 1), (12, 6, 3)])
def test_enumeration_finds_the_best(experts: int, keep: int, groups: int) -> None:
    """462 sets are scored in two parts."""
    space, losses = SetSpace(experts, keep, groups), Pairs(experts, 0)
    expected = sorted((losses.of(x), x) for x in space.all())
    found = enumerate_sets(losses, space, 3)
    assert [(x.loss, x.kept) for x in found.best] == expected[:3]
    assert found.tried == len(losses.asked) == len(set(losses.asked)) == space.count


def plain_greedy(loss: Callable[[tuple[int, ...]], float], experts: int, keep: int) -> list[int]:
    kept = list(range(experts))
    while len(kept) > keep:
        worst = min(kept, key=lambda e: loss(tuple(i for i in kept if i != e)))
        kept.remove(worst)
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_elimination_equals_a_plain_greedy(seed: int) -> None:
    losses = Pairs(9, seed)
    found = eliminate(losses, SetSpace(9, 4), 2)
    expected = plain_greedy(losses.of, 9, 4)
    assert list(found.best[0].kept) == expected
    assert found.best[0].loss == losses.of(tuple(expected))
    assert found.tried == len(losses.asked) == 1 + 9 + 8 + 7 + 6 + 5
    # The runner-up is the second best of the last step.
    before = plain_greedy(losses.of, 9, 5)
    last = sorted(losses.of(tuple(i for i in before if i != e)) for e in before)
    assert found.best[1].loss == last[1]


def test_elimination_takes_from_each_group_in_turn() -> None:
    """Ids 0 to 2 cost nothing, but each group gives one expert a round: 0, then of 3 to 5."""
    cost = np.array([1.0, 2, 3, 40, 50, 60])

    def losses(kept: torch.Tensor) -> Values:
        found: Values = ((~kept).double() @ torch.from_numpy(cost)).numpy()
        return found

    found = eliminate(losses, SetSpace(6, 4, 2), 1)
    assert found.best == (ScoredSet((1, 2, 4, 5), 41.0),)
    assert found.tried == 1 + 6 + 3
    found = eliminate(losses, SetSpace(6, 2, 2), 1)
    assert found.best == (ScoredSet((2, 5), 93.0),)


def test_nothing_to_remove() -> None:
    losses = Pairs(4, 0)
    for search in (eliminate, enumerate_sets):
        assert search(losses, SetSpace(4, 4), 2).best == (ScoredSet((0, 1, 2, 3), 0.0),)


def test_of_equal_losses_the_lower_ids_stay() -> None:
    found = enumerate_sets(lambda kept: np.zeros(len(kept)), SetSpace(4, 2), 6)
    assert [x.kept for x in found.best] == sorted(itertools.combinations(range(4), 2))


def test_masks() -> None:
    assert masks([(0, 2), (1, 2)], 3).tolist() == [[True, False, True], [False, True, True]]
    scored = score_sets(lambda kept: kept.double().sum(1).numpy(), [(0,), (1, 2)], 3)
    assert scored == [ScoredSet((0,), 1.0), ScoredSet((1, 2), 2.0)]
