"""Sets of experts that a layer may keep: all of them, or those that a greedy removal meets.

A router that picks groups of experts first needs the same number in each (``plan_guards``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ids = tuple[int, ...]
"""A set of experts, ascending."""

Losses = Callable[[Tensor], npt.NDArray[np.float64]]
"""[sets, experts] bool -> [sets] float64, what keeping each set costs."""

SETS_AT_ONCE = 256


@dataclass(frozen=True)
class SetSpace:
    """The sets of ``keep`` experts, an equal number of each of ``groups``."""

    experts: int
    keep: int
    groups: int = 1

    @property
    def size(self) -> int:
        """Experts of one group."""
        return self.experts // self.groups

    @property
    def count(self) -> int:
        of_one: int = math.comb(self.size, self.keep // self.groups)
        return math.prod([of_one] * self.groups)

    def all(self) -> Iterator[Ids]:
        """Every set, in lexicographic order within the groups."""
        starts = range(0, self.experts, self.size)
        parts = (
            itertools.combinations(range(start, start + self.size), self.keep // self.groups)
            for start in starts
        )
        for chosen in itertools.product(*parts):
            yield tuple(itertools.chain(*chosen))


@dataclass(frozen=True)
class ScoredSet:
    """A set and what keeping it costs."""

    kept: Ids
    loss: float


@dataclass(frozen=True)
class SetRanking:
    """What a search over the sets of one layer found."""

    best: tuple[ScoredSet, ...]
    """Lowest loss first; of equal losses the set whose ids come first. Not empty."""
    tried: int
    """Sets that were scored."""


def enumerate_sets(losses: Losses, space: SetSpace, best: int) -> SetRanking:
    """Score every set; the ``best`` ones come back."""
    top: list[ScoredSet] = []
    sets = space.all()
    tried = 0
    while part := list(itertools.islice(sets, SETS_AT_ONCE)):
        tried += len(part)
        top = ranked([*top, *score_sets(losses, part, space.experts)])[:best]
    return SetRanking(tuple(top), tried)


def eliminate(losses: Losses, space: SetSpace, best: int) -> SetRanking:
    """Remove one expert after another, each time the one whose loss costs least.

    With groups, each gives one expert before any gives the next. The ``best`` sets are those of
    the last step. (experts^2 - keep^2) / 2 sets are scored, about, where there are no groups.
    """
    kept = tuple(range(space.experts))
    last = [ScoredSet(kept, float(losses(masks([kept], space.experts))[0]))]
    tried = 1
    for _ in range((space.experts - space.keep) // space.groups):
        waiting = set(range(space.groups))
        while waiting:
            candidates = [
                tuple(i for i in kept if i != gone)
                for gone in kept
                if gone // space.size in waiting
            ]
            last = ranked(score_sets(losses, candidates, space.experts))
            tried += len(candidates)
            (gone,) = set(kept) - set(last[0].kept)
            waiting.remove(gone // space.size)
            kept = last[0].kept
    return SetRanking(tuple(last[:best]), tried)


def score_sets(losses: Losses, sets: Sequence[Ids], experts: int) -> list[ScoredSet]:
    """The sets with their losses, in the order given."""
    values = losses(masks(sets, experts)).tolist()
    return [ScoredSet(kept, loss) for kept, loss in zip(sets, values, strict=True)]


def ranked(sets: Iterable[ScoredSet]) -> list[ScoredSet]:
    """Lowest loss first; of equal losses the set whose ids come first."""
    return sorted(sets, key=lambda x: (x.loss, x.kept))


def masks(sets: Sequence[Ids], experts: int) -> Tensor:
    """[sets, experts] bool, true for the experts in a set."""
    found = torch.zeros(len(sets), experts, dtype=torch.bool)
    for place, kept in enumerate(sets):
        found[place, list(kept)] = True
    return found
