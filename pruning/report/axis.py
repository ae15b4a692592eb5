"""Axes of charts: from values to pixels, and the round values that are written beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Maps values from ``low`` to ``high`` to pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(
        cls, values: Sequence[float], start: float, end: float, least: float = 0.005
    ) -> Axis:
        """Room for the values, some more at both ends, and ``least`` where all are equal."""
        low, high = min(values), max(values)
        room = max(0.06 * (high - low), least)
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, most: int, unit: float) -> tuple[list[float], int]:
        """At most about so many round values within the axis, and decimals that tell them apart.

        ``unit`` is what the values are written in: 0.01 for per cents.
        """
        rough = (self.high - self.low) / unit / most
        power = math.floor(math.log10(rough))
        step = next(x for x in (1, 2, 5, 10) if x * 10.0**power >= rough * (1 - 1e-9))
        size = step * 10.0**power * unit
        first, last = math.ceil(self.low / size - 1e-9), math.floor(self.high / size + 1e-9)
        return [i * size for i in range(first, last + 1)], max(0, -power - (step == 10))

    def score_ticks(self, most: int) -> tuple[list[float], int]:
        """Of scores, in per cent: none below 0 or above 1."""
        values, decimals = self.ticks(most, 0.01)
        return [x for x in values if -1e-9 <= x <= 1 + 1e-9], decimals
