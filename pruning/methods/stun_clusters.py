"""STUN's agglomeration: the closest pair joins its clusters unless they would be too wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


class Join(NamedTuple):
    """Two clusters became one."""

    distance: float
    """Of the pair that joined them."""
    first: int
    """The pair, in order."""
    second: int


def joins_at(distances: Matrix, threshold: float, floor: int) -> list[Join]:
    """Which pairs join their clusters, in order.

    Pairs are taken by distance, of equal ones the first row by row, as long as the distance is
    below the threshold; a pair joins its clusters if the largest distance across them is below it,
    too.

    Args:
        distances: [experts, experts], symmetric; the diagonal is not looked at.
        threshold: see above.
        floor: no join leaves fewer clusters.
    """
    rows, columns = np.triu_indices(len(distances), 1)
    order = np.argsort(distances[rows, columns], kind="stable")
    member = [[i] for i in range(len(distances))]
    found: list[Join] = []
    for pair in order:
        a, b = int(rows[pair]), int(columns[pair])
        distance = float(distances[a, b])
        if distance >= threshold or len(distances) - len(found) <= floor:
            break
        if member[a] is member[b] or distances[np.ix_(member[a], member[b])].max() >= threshold:
            continue
        found.append(Join(distance, a, b))
        joined = sorted(member[a] + member[b])
        for i in joined:
            member[i] = joined
    return found


def smallest(distances: Mapping[int, Matrix], floors: Mapping[int, int], removals: int) -> float:
    """The smallest threshold, of those that make a difference, that joins often enough.

    The number of joins hardly ever falls as the threshold rises; where it does, a threshold
    beside the smallest may be found.
    """
    found = [x[np.triu_indices(len(x), 1)] for x in distances.values()]
    # Just above each distance, so that the pair itself is below.
    values = np.nextafter(np.unique(np.concatenate(found)), np.inf)
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        joins = (joins_at(x, values[middle], floors[i]) for i, x in distances.items())
        if sum(map(len, joins)) >= removals:
            high = middle
        else:
            low = middle + 1
    return float(values[low])


def cut(joins: Mapping[int, Sequence[Join]], removals: int) -> dict[int, list[Join]]:
    """The first ``removals`` joins of all layers by distance; each layer's stay in their order."""
    order = sorted(
        (join.distance, index, n) for index, x in joins.items() for n, join in enumerate(x)
    )
    counts = dict.fromkeys(joins, 0)
    for _, index, _ in order[:removals]:
        counts[index] += 1
    return {index: list(x[: counts[index]]) for index, x in joins.items()}


def clusters(experts: int, joins: Sequence[Join]) -> list[list[int]]:
    """The clusters after ``joins``, each ascending, by their first expert."""
    label = list(range(experts))
    for join in joins:
        old, new = label[join.second], label[join.first]
        label = [new if x == old else x for x in label]
    return sorted([i for i in range(experts) if label[i] == x] for x in set(label))
