"""The variation of EEP: first prunings, crossover, mutation, and the choice of parents.

methods.md, sections 2.3 and 2.4. Every function draws from the generator that it is given and from
nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from liveprune.pruning.plan import Matrix
from liveprune.pruning.search.candidate import Candidate
from liveprune.pruning.search.genome import Genome, Space, one_hot
from liveprune.pruning.search.presets import Settings

Mask = npt.NDArray[np.bool_]

MIN_ROW_SUM = 0.1
"""Rows whose sum is nearer to zero are not normalised: that would blow them up."""


def initial(space: Space, rng: np.random.Generator) -> Genome:
    """A random pruning: distinct experts, ascending, the same number in each router group."""
    routers = space.spec.router.groups
    rows = []
    for group in space.groups:
        size, keep = group.experts // routers, group.kept // routers
        ids = [
            start + int(i)
            for start in range(0, group.experts, size)
            for i in sorted(rng.choice(size, keep, replace=False))
        ]
        rows.append(one_hot(ids, group.experts))
    return Genome(tuple(rows), tuple(rows))


def prune_child(
    space: Space, settings: Settings, population: Sequence[Candidate], rng: np.random.Generator
) -> Genome:
    """A child of the prune stage: one-hot distinct rows, the router map equal to the merging."""
    touched = _touched(len(space.groups), settings.weight_change_prob, rng)
    crossing = settings.crossover_in_prune and _crosses(settings, population, rng)
    parents = [_ids(x.genome) for x in _parents(settings, population, rng, crossing=crossing)]
    rows = []
    for place, group in enumerate(space.groups):
        ids = parents[0][place]
        # Row j belongs to router group j // keep: it starts there and never leaves.
        size = group.experts // space.spec.router.groups
        if crossing:
            first, second = parents[0][place], parents[1][place]
            ids = _cross_ids(first, second, size, settings, rng, by_row=bool(touched[place]))
        if touched[place]:
            ids = _mutate_ids(ids, size, settings.row_mutate_prob, rng)
        rows.append(one_hot(ids, group.experts))
    return Genome(tuple(rows), tuple(rows))


def merge_child(
    space: Space, settings: Settings, population: Sequence[Candidate], rng: np.random.Generator
) -> Genome:
    """A child of the merge stage: both matrices vary, each for itself."""
    count = len(space.groups)
    weights, transfers = np.zeros(count, bool), np.zeros(count, bool)
    while not (weights.any() or transfers.any()):
        weights = rng.random(count) < settings.weight_change_prob
        transfers = rng.random(count) < settings.transfer_change_prob
    crossing = _crosses(settings, population, rng)
    parents = [x.genome for x in _parents(settings, population, rng, crossing=crossing)]
    merge, router_map = list(parents[0].merge), list(parents[0].router_map)
    if crossing:
        merge = _cross(merge, parents[1].merge, weights, settings, rng)
        router_map = _cross(router_map, parents[1].router_map, transfers, settings, rng)
    merge = _mutate(merge, weights, settings, rng)
    router_map = _mutate(router_map, transfers, settings, rng)
    if rng.random() < settings.norm_prob:
        merge = [normalised(matrix) for matrix in merge]
    return Genome(tuple(merge), tuple(router_map))


def parent_pool(
    population: Sequence[Candidate],
    settings: Settings,
    rng: np.random.Generator,
    *,
    crossing: bool,
) -> list[Candidate]:
    """Candidates that may become parents of a crossover or, alone, of a mutation.

    Best first, ties shuffled: those within the threshold of the best, and at least ``rank``. Those
    that were dropped in a race are called on only where there are too few others, failed ones
    after them.
    """
    standing = np.array([0 if x.complete else 1 if x.dropped else 2 for x in population])
    means = np.array([x.mean for x in population])
    order = np.lexsort((rng.random(len(population)), -means, standing))
    complete = sum(x.complete for x in population)
    best = population[order[0]].mean
    threshold = settings.crossover_threshold if crossing else settings.mutate_threshold
    near = sum(x.complete and 100 * (best - x.mean) <= threshold + 1e-9 for x in population)
    size = max(near, settings.crossover_rank) if crossing else max(near, settings.mutate_rank) + 1
    needed = 2 if crossing else 1
    return [population[i] for i in order[: max(needed, min(size, complete))]]


def normalised(matrix: Matrix) -> Matrix:
    """The rows divided by their sums, except where a sum is about zero."""
    sums = matrix.sum(axis=1, keepdims=True)
    usable = np.abs(sums) >= MIN_ROW_SUM
    divided: Matrix = (matrix / np.where(usable, sums, 1)).astype(np.float32)
    return divided


def _crosses(settings: Settings, population: Sequence[Candidate], rng: np.random.Generator) -> bool:
    return bool(rng.random() < settings.crossover_prob) and len(population) > 1


def _parents(
    settings: Settings,
    population: Sequence[Candidate],
    rng: np.random.Generator,
    *,
    crossing: bool,
) -> list[Candidate]:
    """Two distinct parents for a crossover, else one."""
    pool = parent_pool(population, settings, rng, crossing=crossing)
    return [pool[i] for i in rng.choice(len(pool), 2 if crossing else 1, replace=False)]


def _touched(count: int, probability: float, rng: np.random.Generator) -> Mask:
    while not (mask := rng.random(count) < probability).any():
        pass
    return mask


def _ids(genome: Genome) -> list[list[int]]:
    return [matrix.argmax(axis=1).tolist() for matrix in genome.merge]


def _mutate_ids(
    ids: list[int], size: int, probability: float, rng: np.random.Generator
) -> list[int]:
    """Rows take, each with the probability, an expert of their router group not kept so far."""
    ids = list(ids)
    for row in np.flatnonzero(rng.random(len(ids)) < probability):
        free = _free(ids, ids[row], size)
        if free:
            ids[row] = free[rng.integers(len(free))]
    return ids


def _cross_ids(
    first: list[int],
    second: list[int],
    size: int,
    settings: Settings,
    rng: np.random.Generator,
    *,
    by_row: bool,
) -> list[int]:
    """Mix two prunings; a row whose expert is taken takes the other parent's, else a free one."""
    if not by_row:
        return first if rng.random() < settings.crossover_first_prob else second
    child: list[int] = []
    for row, from_first in enumerate(rng.random(len(first)) < settings.crossover_first_prob):
        pair = (first[row], second[row]) if from_first else (second[row], first[row])
        free = [i for i in pair if i not in child] or _free(child, first[row], size)
        child.append(free[0] if free[0] in pair else free[rng.integers(len(free))])
    return child


def _free(ids: list[int], like: int, size: int) -> list[int]:
    """Experts of the router group of ``like`` that ``ids`` lacks."""
    start = like // size * size
    return [i for i in range(start, start + size) if i not in ids]


def _cross(
    first: Sequence[Matrix],
    second: Sequence[Matrix],
    touched: Mask,
    settings: Settings,
    rng: np.random.Generator,
) -> list[Matrix]:
    """Touched matrices mix by row, the others come whole from one parent."""
    mixed = []
    for one, other, by_row in zip(first, second, touched, strict=True):
        rows = rng.random((len(one) if by_row else 1, 1)) < settings.crossover_first_prob
        mixed.append(np.where(rows, one, other))
    return mixed


def _mutate(
    matrices: Sequence[Matrix], touched: Mask, settings: Settings, rng: np.random.Generator
) -> list[Matrix]:
    """Add Gaussian noise to some elements of the touched matrices."""
    changed = list(matrices)
    for place in np.flatnonzero(touched):
        matrix = changed[place]
        hit = rng.random(matrix.shape) < settings.element_prob
        noise = settings.scale * rng.standard_normal(matrix.shape)
        changed[place] = (matrix + hit * noise).astype(np.float32)
    return changed
