"""A treatment arm against the control arm in one measure, as a few numbers that bounds follow from.

Every contrast bounds ``treatment - scale * control``, so that a relative margin m is the contrast
with scale 1 + m: no ratio is ever formed. A lower and an upper bound are each false with
probability at most alpha, however often they are looked at; ``None`` means unbounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiments import rates
from liveprune.server.experiments.fields import Fields
from liveprune.server.experiments.sequences import one_sided_radius, prior_variance

Side = Literal["lower", "upper"]


@dataclass(frozen=True)
class MeanContrast:
    """Means; phases are combined with the weights of Mantel and Haenszel."""

    control_count: int
    treatment_count: int
    control: float
    treatment: float
    control_variance: float
    """Of the mean, from sums per unit."""
    treatment_variance: float
    covariance: float
    """Of the two means: a ramp moves units from one arm to the other."""
    control_independent: float
    """Variance of the mean if requests were independent: never believe less."""
    treatment_independent: float
    units: float
    """Distinct units, ``4 / (1 / control + 1 / treatment)``: as many at equal shares."""
    planned: int

    def estimate(self, scale: float = 1.0) -> float:
        return self.treatment - scale * self.control

    def bound(self, side: Side, scale: float, alpha: float) -> float | None:
        clustered = (
            self.treatment_variance
            + scale * scale * self.control_variance
            - 2 * scale * self.covariance
        )
        independent = self.treatment_independent + scale * scale * self.control_independent
        variance = max(clustered, independent)
        prior = prior_variance(variance, self.units, self.planned, alpha)
        radius = float(one_sided_radius(variance, prior, alpha))
        return self.estimate(scale) + (radius if side == "upper" else -radius)


@dataclass(frozen=True)
class RatePhase:
    """One phase; hits are sums of values in [0, 1]."""

    control_count: int
    control_hits: float
    control_inflation: float
    """Variance from sums per unit over that of independent requests, at least 1."""
    treatment_count: int
    treatment_hits: float
    treatment_inflation: float


@dataclass(frozen=True)
class RateContrast:
    """Rates: exact for independent requests, counts scaled down where units repeat."""

    phases: tuple[RatePhase, ...]

    @property
    def control_count(self) -> int:
        return sum(x.control_count for x in self.phases)

    @property
    def treatment_count(self) -> int:
        return sum(x.treatment_count for x in self.phases)

    @property
    def control(self) -> float:
        return sum(x.control_hits for x in self.phases) / self.control_count

    @property
    def treatment(self) -> float:
        return sum(x.treatment_hits for x in self.phases) / self.treatment_count

    def estimate(self, scale: float = 1.0) -> float:
        """Phases weighted as in ``MeanContrast``."""
        weights = [
            x.control_count * x.treatment_count / (x.control_count + x.treatment_count)
            for x in self.phases
        ]
        differences = [
            x.treatment_hits / x.treatment_count - scale * x.control_hits / x.control_count
            for x in self.phases
        ]
        return float(np.average(differences, weights=weights))

    def bound(self, side: Side, scale: float, alpha: float) -> float | None:
        columns = [
            [getattr(x, name) / getattr(x, f"{arm}_inflation") for x in self.phases]
            for arm in ("control", "treatment")
            for name in (f"{arm}_hits", f"{arm}_count")
        ]
        counts = rates.Counts(*(np.array(column, float) for column in columns))
        return rates.bound(counts, scale, alpha, "above" if side == "lower" else "below")


@dataclass(frozen=True)
class QuantilePhase:
    """One phase, with each arm's interval at every level that a decision asks for."""

    control_count: int
    control: float
    treatment_count: int
    treatment: float
    intervals: tuple[tuple[float, float | None, float | None, float | None, float | None], ...]
    """Rows of alpha, control's lower and upper, treatment's lower and upper end; the level is
    already shared out over phases and arms."""


@dataclass(frozen=True)
class QuantileContrast:
    """Quantiles: each phase by itself, the tightest bound counts."""

    phases: tuple[QuantilePhase, ...]

    @property
    def control_count(self) -> int:
        return sum(x.control_count for x in self.phases)

    @property
    def treatment_count(self) -> int:
        return sum(x.treatment_count for x in self.phases)

    @property
    def control(self) -> float:
        """Of the last phase: quantiles of different phases do not add up."""
        return self.phases[-1].control

    @property
    def treatment(self) -> float:
        return self.phases[-1].treatment

    def estimate(self, scale: float = 1.0) -> float:
        return self.treatment - scale * self.control

    def bound(self, side: Side, scale: float, alpha: float) -> float | None:
        """Raises ExperimentError for an alpha whose intervals were not recorded."""
        found: list[float] = []
        for phase in self.phases:
            row = next((x for x in phase.intervals if x[0] == alpha), None)
            if row is None:
                raise ExperimentError(
                    f"quantile: found intervals at {[x[0] for x in phase.intervals]}, expected "
                    f"one at {alpha}"
                )
            _, control_low, control_high, low, high = row
            treatment, control = (low, control_high) if side == "lower" else (high, control_low)
            if treatment is not None and control is not None:
                found.append(treatment - scale * control)
        if not found:
            return None
        return max(found) if side == "lower" else min(found)


Contrast = MeanContrast | RateContrast | QuantileContrast
_KINDS: dict[str, type[Contrast]] = {
    "mean": MeanContrast,
    "rate": RateContrast,
    "quantile": QuantileContrast,
}


def contrast_to_json(contrast: Contrast) -> dict[str, Any]:
    """The form that ``contrast_from_json`` reads back to an equal contrast."""
    kind = next(kind for kind, cls in _KINDS.items() if isinstance(contrast, cls))
    return {"kind": kind, **dataclasses.asdict(contrast)}


def contrast_from_json(form: object) -> Contrast:
    """Read what ``contrast_to_json`` wrote.

    Raises:
        ExperimentError: malformed, or of an unknown kind.
    """
    fields = Fields(form, "contrast")
    kind = fields.text("kind")
    if kind == "mean":
        values = {x.name: fields.number(x.name) for x in dataclasses.fields(MeanContrast)}
        found: Contrast = MeanContrast(**values)  # type: ignore[arg-type]
    elif kind == "rate":
        found = RateContrast(
            tuple(RatePhase(**_numbers(RatePhase, x)) for x in fields.items("phases"))
        )
    elif kind == "quantile":
        found = QuantileContrast(tuple(_quantile_phase(x) for x in fields.items("phases")))
    else:
        raise fields.error("kind", kind, f"one of {', '.join(_KINDS)}")
    fields.done()
    return found


def _numbers(kind: type[Any], form: object) -> dict[str, Any]:
    fields = Fields(form, "phase")
    values = {x.name: fields.number(x.name) for x in dataclasses.fields(kind)}
    fields.done()
    return values


def _quantile_phase(form: object) -> QuantilePhase:
    if not isinstance(form, Mapping):
        raise ExperimentError(f"phase: found {form!r:.80}, expected an object")
    rows = Fields({"intervals": form.get("intervals")}, "phase").items("intervals")
    intervals = []
    for row in rows:
        values = row if isinstance(row, list | tuple) else ()
        if len(values) != 5 or not all(x is None or isinstance(x, int | float) for x in values):
            raise ExperimentError(f"phase: intervals: found {row!r:.80}, expected five numbers")
        intervals.append(tuple(values))
    rest = {key: value for key, value in form.items() if key != "intervals"}
    fields = Fields(rest, "phase")
    found = QuantilePhase(
        control_count=fields.count("control_count"),
        control=fields.number("control"),
        treatment_count=fields.count("treatment_count"),
        treatment=fields.number("treatment"),
        intervals=tuple(intervals),
    )
    fields.done()
    return found
