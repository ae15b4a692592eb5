"""Count, mean and spread of a stream, in three numbers."""

from __future__ import annotations

from dataclasses import dataclass

from liveprune.server.experiments.fields import Fields


@dataclass
class Moments:
    """Welford's sums; two streams' sums merge exactly (Chan, Golub and LeVeque 1979)."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    """Sum of squared distances from the mean."""

    def add(self, value: float) -> None:
        self.count += 1
        distance = value - self.mean
        self.mean += distance / self.count
        self.m2 += distance * (value - self.mean)

    def merge(self, other: Moments) -> None:
        """Take in another stream."""
        if other.count == 0:
            return
        count = self.count + other.count
        distance = other.mean - self.mean
        self.m2 += other.m2 + distance * distance * self.count * other.count / count
        self.mean += distance * other.count / count
        self.count = count

    @property
    def variance(self) -> float:
        """Unbiased; 0 below two values."""
        return self.m2 / (self.count - 1) if self.count > 1 else 0.0

    def to_json(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_json(cls, form: object) -> Moments:
        """Read what ``to_json`` wrote.

        Raises:
            ExperimentError: names the field.
        """
        fields = Fields(form, "moments")
        found = cls(
            fields.count("count"), float(fields.number("mean")), float(fields.number("m2", low=0))
        )
        fields.done()
        return found
