"""Which pages the rows of a memory range touch, and which become free when rows are released."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Runs = list[tuple[int, int]]
"""Ranges of pages, ``(start, stop)`` each: apart from each other, in order."""


@dataclass(frozen=True)
class Region:
    """One place of every row: row ``i`` holds ``extent`` bytes from ``offset + i * stride``."""

    offset: int
    stride: int
    extent: int


class PageCounts:
    """How many committed rows touch each page."""

    def __init__(self, pages: int) -> None:
        self._counts = np.zeros(pages, np.int32)
        self.occupied = 0
        """Pages that a committed row touches."""

    def add(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> Runs:
        """Count rows that touch pages ``first`` to ``last``; returns the pages that were free."""
        low, touches = _touches(first, last)
        window = self._counts[low : low + len(touches)]
        taken = (window == 0) & (touches > 0)
        window += touches
        self.occupied += int(taken.sum())
        return _runs(taken, low)

    def remove(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> Runs:
        """Forget rows that were added; returns the pages that are free now."""
        low, touches = _touches(first, last)
        window = self._counts[low : low + len(touches)]
        window -= touches
        freed = (window == 0) & (touches > 0)
        self.occupied -= int(freed.sum())
        return _runs(freed, low)


def _touches(first: NDArray[np.int64], last: NDArray[np.int64]) -> tuple[int, NDArray[np.int32]]:
    """The lowest page, and from it on how many of the ranges ``first`` to ``last`` hold each."""
    low = int(first.min())
    steps = np.zeros(int(last.max()) - low + 2, np.int32)
    np.add.at(steps, first - low, 1)
    np.subtract.at(steps, last - low + 1, 1)
    return low, np.cumsum(steps[:-1], dtype=np.int32)


def _runs(chosen: NDArray[np.bool_], low: int) -> Runs:
    edges = low + np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def joined(runs: Runs) -> Runs:
    """The same pages in as few runs as possible."""
    fewer: Runs = []
    for start, stop in sorted(runs):
        if fewer and fewer[-1][1] == start:
            fewer[-1] = (fewer[-1][0], stop)
        else:
            fewer.append((start, stop))
    return fewer
