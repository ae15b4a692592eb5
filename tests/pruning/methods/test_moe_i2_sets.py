"""The genetic search against enumeration, and what it may and may not try."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch

from liveprune.pruning.methods.expert_sets import SetRanking, SetSpace, enumerate_sets
from liveprune.pruning.methods.moe_i2_sets import Breeding, search_sets


class Pairs:
    """The loss of a set: of each pair of experts that both went, its entry in a random matrix."""

    def __init__(self, experts: int, seed: int) -> None:
        self.matrix = np.random.default_rng(seed).random((experts, experts))
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, kept: torch.Tensor) -> npt.NDArray[np.float64]:
        self.asked += [tuple(np.flatnonzero(row).tolist()) for row in kept.numpy()]
        gone = (~kept).numpy().astype(float)
        found: npt.NDArray[np.float64] = np.einsum("si,ij,sj->s", gone, self.matrix, gone)
        return found


def search(
    losses: Pairs, space: SetSpace, *, seed: int = 0, best: int = 3, **settings: float
) -> SetRanking:
    chosen = {"population": 20, "generations": 15, "mutation": 0.5, **settings}
    return search_sets(
        losses,
        space,
        best,
        Breeding(**chosen),  # type: ignore[arg-type]
        np.random.default_rng(seed),
    )


@pytest.mark.parametrize("seed", range(4))
def test_it_finds_the_best_of_all_sets(seed: int) -> None:
    """320 of 924 sets at most."""
    space = SetSpace(12, 6)
    losses = Pairs(12, seed)
    found = search(losses, space)
    assert found.best[0] == enumerate_sets(Pairs(12, seed), space, 1).best[0]
    assert found.tried < 350 < space.count


def test_no_set_is_tried_twice_and_each_keeps_its_number() -> None:
    losses = Pairs(12, 0)
    found = search(losses, SetSpace(12, 5))
    assert len(losses.asked) == len(set(losses.asked)) == found.tried == 20 * 16
    assert {len(x) for x in losses.asked} == {5}
    assert [x.loss for x in found.best] == sorted(losses(torch.tensor(rows(losses.asked, 12))))[:3]


def rows(sets: list[tuple[int, ...]], experts: int) -> list[list[bool]]:
    return [[i in kept for i in range(experts)] for kept in sets]


def test_groups_keep_their_numbers() -> None:
    losses = Pairs(16, 0)
    found = search(losses, SetSpace(16, 8, 4))
    for kept in losses.asked:
        assert [sum(i // 4 == g for i in kept) for g in range(4)] == [2, 2, 2, 2]
    best = enumerate_sets(Pairs(16, 0), SetSpace(16, 8, 4), 10)
    assert found.best[0].loss <= best.best[-1].loss


def test_it_follows_its_seed() -> None:
    space = SetSpace(14, 7)
    asked = []
    for seed in (1, 1, 2):
        losses = Pairs(14, 0)
        search(losses, space, seed=seed)
        asked.append(losses.asked)
    assert asked[0] == asked[1] != asked[2]


def test_children_take_from_both_parents() -> None:
    """Without mutation what goes from a child goes from one of its parents."""
    losses = Pairs(14, 0)
    space = SetSpace(14, 10)
    search(losses, space, generations=1, mutation=0.0, population=40)
    first, children = losses.asked[:40], losses.asked[40:]
    gone = [set(range(14)) - set(x) for x in first]
    from_parents = [
        any(
            set(range(14)) - set(child) <= one | other
            for one, other in itertools.combinations(gone, 2)
        )
        for child in children
    ]
    # Those that had been tried are mutated all the same.
    assert sum(from_parents) > 0.8 * len(children)


def test_breeding_beats_chance() -> None:
    """With as many sets tried, and over several layers, the best that breeding finds is better."""
    space = SetSpace(30, 15)
    bred = [search(Pairs(30, n), space).best[0].loss for n in range(5)]
    drawn = [
        search(Pairs(30, n), space, population=320, generations=0).best[0].loss for n in range(5)
    ]
    assert all(b < d for b, d in zip(bred, drawn, strict=True))


def test_few_sets_are_all_tried() -> None:
    losses = Pairs(8, 0)
    found = search(losses, SetSpace(8, 4), population=10, generations=6)
    assert found == enumerate_sets(Pairs(8, 0), SetSpace(8, 4), 3)
    assert found.tried == 70
