"""A histogram of Prometheus, counted here and shown by a collector."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


class Histogram:
    """Counts per bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """``bounds``: upper ends of the buckets, rising; one without a bound follows."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        """Sum of all values."""

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self.total += value

    def cumulated(self) -> list[tuple[str, float]]:
        """Bound, and how many values lie at or below it."""
        bounds = [str(float(bound)) for bound in self._bounds] + ["+Inf"]
        return [(bound, sum(self._counts[: i + 1])) for i, bound in enumerate(bounds)]
