"""MoEITS's choice: of the two experts that know most of each other, the more central one goes.

Greedy, down to one expert. The largest NMI left can only fall on the way, so a fixed threshold
stops this order somewhere, and a fixed count elsewhere: both variants are prefixes of it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Removals:
    """In which order a layer's experts go."""

    removed: tuple[int, ...]
    """All experts but the last one left."""
    nmi: tuple[float, ...]
    """The largest NMI left when each of them went; never rises."""
    mean: float
    """Of all entries of the matrix of NMIs, zero diagonal included."""
    iqr: float
    """Interquartile range of the same."""

    @property
    def experts(self) -> int:
        return len(self.removed) + 1

    def threshold(self, tau: float) -> float:
        """The NMI above which a pair is too alike: mean + tau * IQR, not updated on the way."""
        return self.mean + tau * self.iqr

    def above(self, tau: float) -> int:
        """How many experts go until no pair is above the threshold."""
        return int(np.sum(np.array(self.nmi) > self.threshold(tau)))

    def kept(self, tau: float, floor: int, protected: Collection[int] = ()) -> frozenset[int]:
        """Who stays at ``tau``: at least ``floor`` experts, and the protected."""
        gone = self.removed[: min(self.above(tau), max(0, self.experts - floor))]
        return frozenset(range(self.experts)) - set(gone) | set(protected)

    def scores(self) -> Scores:
        """[experts] float64: when each goes, from 0; the last one left comes after all others."""
        scores = np.full(self.experts, float(len(self.removed)))
        scores[list(self.removed)] = np.arange(len(self.removed))
        return scores


def removals(matrix: npt.NDArray[np.float64]) -> Removals:
    """Work the greedy out on a symmetric [experts, experts] matrix with a zero diagonal.

    Of the pair with the largest entry (of equal ones the first, row by row) the expert with the
    larger mean over the rows and columns left goes; if equal, the second.
    """
    quartiles = np.percentile(matrix, [25, 75])
    left = list(range(len(matrix)))
    removed, largest = [], []
    rest = matrix
    while len(left) > 1:
        # The upper triangle, so that a pair is found even where all NMIs are 0 as the diagonal is.
        rows, columns = np.triu_indices(len(left), 1)
        pair = int(np.argmax(rest[rows, columns]))
        a, b = int(rows[pair]), int(columns[pair])
        gone = a if rest[a].mean() > rest[b].mean() else b
        removed.append(left.pop(gone))
        largest.append(float(rest[a, b]))
        rest = np.delete(np.delete(rest, gone, 0), gone, 1)
    iqr = float(quartiles[1] - quartiles[0])
    return Removals(tuple(removed), tuple(largest), float(matrix.mean()), iqr)
