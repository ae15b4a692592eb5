"""What is measured of a finished request, and what a comparison of arms looks at."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from liveprune.pruning.errors import ExperimentError

Direction = Literal["lower", "higher"]
Kind = Literal["mean", "rate"]


@dataclass(frozen=True)
class Metric:
    """One number of one request."""

    name: str
    kind: Kind
    """``rate``: every value lies in [0, 1]."""
    better: Direction
    quantiles: bool = False
    """Whether a sketch of its distribution is kept: non-negative values with a tail."""


METRICS = {
    metric.name: metric
    for metric in (
        Metric("ttft_seconds", "mean", "lower", quantiles=True),
        Metric("inter_token_seconds", "mean", "lower", quantiles=True),
        Metric("e2e_seconds", "mean", "lower", quantiles=True),
        Metric("queue_seconds", "mean", "lower", quantiles=True),
        Metric("prompt_tokens", "mean", "lower", quantiles=True),
        Metric("output_tokens", "mean", "lower", quantiles=True),
        Metric("error", "rate", "lower"),
        Metric("length", "rate", "lower"),
        Metric("empty", "rate", "lower"),
        Metric("loop", "rate", "lower"),
        Metric("bad_json", "rate", "lower"),
        Metric("bad_tool_call", "rate", "lower"),
        Metric("score", "rate", "higher"),
        Metric("agreement", "rate", "higher"),
        Metric("top1_agreement", "rate", "higher"),
        Metric("kl", "mean", "lower"),
        Metric("log_likelihood_gap", "mean", "lower"),
    )
}


@dataclass(frozen=True)
class Measure:
    """A statistic of a metric: its mean (of a rate: the share), or a quantile."""

    metric: str
    statistic: str = "mean"
    """``mean`` or ``pNN``, e.g. ``p95`` or ``p99.9``."""
    better: Direction = "lower"

    @classmethod
    def of(cls, metric: object, statistic: object = "mean", better: object = None) -> Measure:
        """Check the three; without ``better`` the metric's own direction holds.

        Raises:
            ExperimentError: an unknown metric, statistic or direction, or a quantile of a metric
                without a sketch.
        """
        found = METRICS.get(metric) if isinstance(metric, str) else None
        if found is None:
            raise ExperimentError(f"metric: found {metric!r}, expected one of {', '.join(METRICS)}")
        if statistic != "mean":
            if not isinstance(statistic, str) or not re.fullmatch(r"p\d{1,2}(\.\d+)?", statistic):
                raise ExperimentError(
                    f"statistic of {found.name}: found {statistic!r}, expected 'mean' or a "
                    "quantile such as 'p95'"
                )
            if not found.quantiles or float(statistic[1:]) == 0:
                raise ExperimentError(
                    f"statistic of {found.name}: found {statistic!r}, expected 'mean'; quantiles "
                    f"are kept of {', '.join(m.name for m in METRICS.values() if m.quantiles)}, "
                    "and lie above p0"
                )
        if better is None:
            better = found.better
        if better == "lower":
            return cls(found.name, str(statistic), "lower")
        if better == "higher":
            return cls(found.name, str(statistic), "higher")
        raise ExperimentError(
            f"better of {found.name}: found {better!r}, expected 'lower' or 'higher'"
        )

    @property
    def quantile(self) -> float | None:
        """The level in (0, 1); None for a mean."""
        return None if self.statistic == "mean" else float(self.statistic[1:]) / 100

    @property
    def kind(self) -> Literal["mean", "rate", "quantile"]:
        return "quantile" if self.statistic != "mean" else METRICS[self.metric].kind

    @property
    def label(self) -> str:
        return self.metric if self.statistic == "mean" else f"{self.metric} {self.statistic}"


@dataclass(frozen=True)
class Guardrail:
    """What must not get worse, and by how much it may."""

    measure: Measure
    margin: float
    """Non-negative, in the metric's unit; ``relative``: a fraction of the control arm's value."""
    relative: bool = False

    @property
    def label(self) -> str:
        return self.measure.label


def check_value(metric: str, value: float) -> float:
    """Refuse a value that the metric cannot have.

    Raises:
        ExperimentError: an unknown metric; not a finite number; a rate outside [0, 1]; a negative
            value of a metric with a sketch.
    """
    found = METRICS.get(metric)
    if found is None:
        raise ExperimentError(f"metric: found {metric!r}, expected one of {', '.join(METRICS)}")
    if not math.isfinite(value):
        raise ExperimentError(f"{metric}: found {value!r}, expected a finite number")
    if found.kind == "rate" and not 0 <= value <= 1:
        raise ExperimentError(f"{metric}: found {value!r}, expected a number from 0 to 1")
    if found.quantiles and value < 0:
        raise ExperimentError(f"{metric}: found {value!r}, expected a number of at least 0")
    return value
