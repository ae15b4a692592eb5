"""MoE-I2: a genetic search for the sets of experts that a layer can best do without.

arXiv:2411.01016 (methods.md, 7.3), known from a summary: random removal sets, the Frobenius
distance of the layer's output as fitness, a child that is a sample from the union of two parents'
removals and then mutates, a number of generations, the best sets at the end. Sizes are the
paper's. Unverified, and chosen here: parents come from the better half of the population, each
generation makes as many children as there are sets, the best of both go on, and a mutation
exchanges one removed expert for one of its group that was kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from liveprune.pruning.methods.expert_sets import (
    Ids,
    Losses,
    ScoredSet,
    SetRanking,
    SetSpace,
    enumerate_sets,
    ranked,
    score_sets,
)

REDRAWS = 20
"""Mutations of a child that was tried before, after which it is given up."""


@dataclass(frozen=True)
class Breeding:
    """Parameters of the search."""

    population: int
    generations: int
    mutation: float
    """Probability that a child mutates."""


def search_sets(
    losses: Losses, space: SetSpace, best: int, settings: Breeding, generator: np.random.Generator
) -> SetRanking:
    """The ``best`` sets that the search meets.

    Where there are no more sets than it would score, all of them are scored instead. No set is
    scored twice.
    """
    if space.count <= settings.population * (settings.generations + 1):
        return enumerate_sets(losses, space, best)
    tried: set[Ids] = set()
    people: list[ScoredSet] = []
    for generation in range(settings.generations + 1):
        parents = people[: max(2, settings.population // 2)]
        fresh: list[Ids] = []
        for _ in range(settings.population):
            kept = _child(parents, space, settings, generator) if generation else None
            kept = kept or _random(space, generator)
            for _ in range(REDRAWS):
                if kept not in tried:
                    tried.add(kept)
                    fresh.append(kept)
                    break
                kept = _mutated(kept, space, generator)
        scored = score_sets(losses, fresh, space.experts)
        people = ranked([*people, *scored])[: max(settings.population, best)]
    return SetRanking(tuple(people[:best]), len(tried))


def _random(space: SetSpace, generator: np.random.Generator) -> Ids:
    return _kept(
        space,
        [
            generator.choice(group, _removed_each(space), replace=False).tolist()
            for group in _groups(space)
        ],
    )


def _child(
    parents: Sequence[ScoredSet],
    space: SetSpace,
    settings: Breeding,
    generator: np.random.Generator,
) -> Ids:
    one, other = generator.choice(len(parents), 2, replace=False)
    both = set(parents[one].kept) & set(parents[other].kept)
    removed = [
        generator.choice([i for i in group if i not in both], _removed_each(space), replace=False)
        for group in _groups(space)
    ]
    child = _kept(space, [ids.tolist() for ids in removed])
    if generator.random() < settings.mutation:
        child = _mutated(child, space, generator)
    return child


def _mutated(kept: Ids, space: SetSpace, generator: np.random.Generator) -> Ids:
    """One kept expert goes, one that was removed from its group comes back."""
    gone = int(generator.choice(kept))
    group = _groups(space)[gone // space.size]
    back = int(generator.choice([i for i in group if i not in kept]))
    return tuple(sorted({*kept, back} - {gone}))


def _removed_each(space: SetSpace) -> int:
    return (space.experts - space.keep) // space.groups


def _groups(space: SetSpace) -> list[range]:
    return [range(start, start + space.size) for start in range(0, space.experts, space.size)]


def _kept(space: SetSpace, removed: Sequence[Sequence[int]]) -> Ids:
    gone = {i for ids in removed for i in ids}
    return tuple(i for i in range(space.experts) if i not in gone)
