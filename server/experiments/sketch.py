"""A distribution in constant memory: DDSketch (Masson, Rim and Lee, VLDB 2019), wrapped.

Every quantile comes back within 1% of itself. Values are kept between a microsecond and a hundred
days (or tokens), which bounds the sketch to about 1,500 bins; what is smaller counts as zero.
"""

from __future__ import annotations

import base64
from typing import Any

from ddsketch import DDSketch
from ddsketch.pb import ddsketch_pb2
from ddsketch.pb.proto import DDSketchProto
from google.protobuf.message import DecodeError

from liveprune.pruning.errors import ExperimentError

ACCURACY = 0.01
"""Relative error of a quantile."""
SMALLEST, LARGEST = 1e-6, 1e7


class Sketch:
    """Mergeable quantiles of non-negative numbers."""

    def __init__(self) -> None:
        self._sketch = DDSketch(ACCURACY)

    @property
    def count(self) -> int:
        return int(self._sketch.count)

    def add(self, value: float) -> None:
        """Count a value.

        Raises:
            ExperimentError: negative or not a number.
        """
        if not value >= 0:
            raise ExperimentError(f"sketch: found {value!r}, expected a number of at least 0")
        self._sketch.add(0.0 if value < SMALLEST else min(value, LARGEST))

    def merge(self, other: Sketch) -> None:
        """Take in another stream: the same as if its values had been added here."""
        self._sketch.merge(other._sketch)

    def value_at(self, rank: int) -> float:
        """The ``rank``-th smallest value, from 1 to ``count``, within ``ACCURACY`` of itself."""
        last = self.count - 1
        if not 1 <= rank <= self.count:
            raise IndexError(f"rank {rank} of a sketch of {self.count} values")
        # Half a rank more, so that rounding cannot reach back into the bin below.
        return float(self._sketch.get_quantile_value(min(1.0, (rank - 0.5) / max(last, 1))))

    def quantile(self, level: float) -> float | None:
        """The smallest value with at least ``level`` of all values at or below; None: empty."""
        if self.count == 0:
            return None
        rank = -int(-level * self.count // 1)
        return self.value_at(min(max(rank, 1), self.count))

    def to_json(self) -> str:
        """The library's own protobuf form, as base64."""
        form: bytes = DDSketchProto.to_proto(self._sketch).SerializeToString()
        return base64.b64encode(form).decode()

    @classmethod
    def from_json(cls, form: Any) -> Sketch:
        """Read what ``to_json`` wrote.

        Raises:
            ExperimentError: damaged, or of another accuracy.
        """
        found = cls()
        try:
            proto = ddsketch_pb2.DDSketch.FromString(base64.b64decode(form, validate=True))
            # Merging checks that both have one accuracy.
            found._sketch.merge(DDSketchProto.from_proto(proto))
        except (TypeError, ValueError, ZeroDivisionError, DecodeError) as error:
            raise ExperimentError(f"sketch: not readable: {error}") from error
        return found
