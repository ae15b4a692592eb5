"""From measurements to contrasts: means with their variances, rates, ranks of quantiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from liveprune.server.experiments.contrast import (
    Contrast,
    MeanContrast,
    QuantileContrast,
    QuantilePhase,
    RateContrast,
    RatePhase,
)
from liveprune.server.experiments.measurements import Cell, Measurements
from liveprune.server.experiments.metrics import Measure
from liveprune.server.experiments.mismatch import UnitCounts, spending
from liveprune.server.experiments.sequences import rank_interval
from liveprune.server.experiments.sketch import ACCURACY
from liveprune.server.experiments.units import covariance, distinct_units


def unit_counts(measurements: Measurements) -> tuple[UnitCounts, ...]:
    """Distinct units of each phase, for the test of their shares."""
    return tuple(
        UnitCounts(phase.units.sampled(), phase.shares, phase.units.level)
        for phase in measurements.phases
    )


def units_by_arm(measurements: Measurements) -> dict[str, int]:
    """Arm to distinct units over all phases."""
    return distinct_units([phase.units for phase in measurements.phases])


def contrast_of(
    measurements: Measurements,
    measure: Measure,
    control: str,
    treatment: str,
    planned: int,
    levels: Sequence[float],
) -> Contrast | None:
    """Compare two arms in one measure.

    Args:
        measurements: of the experiment.
        measure: what is compared.
        control: an arm.
        treatment: an arm.
        planned: units at which bounds shall be narrowest.
        levels: alphas of the bounds that will be asked for; only quantiles need to know.

    Returns:
        None if no phase has values of both arms.
    """
    pairs = []
    for i, phase in enumerate(measurements.phases):
        a, b = (phase.cells.get(arm, {}).get(measure.metric) for arm in (control, treatment))
        if a is not None and b is not None and a.moments.count and b.moments.count:
            pairs.append((i, a, b))
    if not pairs:
        return None
    if measure.quantile is not None:
        level = measure.quantile
        return QuantileContrast(
            tuple(_quantiles(i, a, b, level, planned, levels) for i, a, b in pairs)
        )
    if measure.kind == "rate":
        return RateContrast(tuple(_rates(a, b) for _, a, b in pairs))
    units = units_by_arm(measurements)
    return _means(
        [(a, b) for _, a, b in pairs], units.get(control, 0), units.get(treatment, 0), planned
    )


def _means(
    pairs: Sequence[tuple[Cell, Cell]], control_units: int, treatment_units: int, planned: int
) -> MeanContrast:
    counts = [(a.moments.count, b.moments.count) for a, b in pairs]
    weights = [a * b / (a + b) for a, b in counts]
    weights = [weight / sum(weights) for weight in weights]
    means, scores, independent = [], [], []
    for arm in (0, 1):
        cells = [pair[arm] for pair in pairs]
        means.append(sum(w * x.moments.mean for w, x in zip(weights, cells, strict=True)))
        scores.append(np.array(weights) @ np.stack([x.clusters.scores() for x in cells]))
        independent.append(
            sum(
                w * w * x.moments.variance / x.moments.count
                for w, x in zip(weights, cells, strict=True)
            )
        )
    # A unit is counted when it is assigned, so arms with values have units; requests that were
    # never assigned here (a replica that restarted) leave at least one.
    inverse = 1 / max(control_units, 1) + 1 / max(treatment_units, 1)
    return MeanContrast(
        control_count=sum(a for a, _ in counts),
        treatment_count=sum(b for _, b in counts),
        control=means[0],
        treatment=means[1],
        control_variance=covariance(scores[0], scores[0]),
        treatment_variance=covariance(scores[1], scores[1]),
        covariance=covariance(scores[0], scores[1]),
        control_independent=independent[0],
        treatment_independent=independent[1],
        units=4 / inverse,
        planned=planned,
    )


def _rates(control: Cell, treatment: Cell) -> RatePhase:
    return RatePhase(
        control.moments.count,
        float(control.clusters.sums.sum()),
        inflation(control),
        treatment.moments.count,
        float(treatment.clusters.sums.sum()),
        inflation(treatment),
    )


def inflation(cell: Cell) -> float:
    """Design effect: variance of the mean from sums per unit over that of independent requests."""
    independent = cell.moments.variance / cell.moments.count
    scores = cell.clusters.scores()
    return max(1.0, covariance(scores, scores) / independent) if independent > 0 else 1.0


def _quantiles(
    phase: int, control: Cell, treatment: Cell, level: float, planned: int, levels: Sequence[float]
) -> QuantilePhase:
    rows = []
    for alpha in dict.fromkeys(levels):
        # A difference takes one end of each arm's interval: half of alpha each.
        spent = alpha * spending(phase) / 2
        ends = [_ends(cell, level, spent, planned) for cell in (control, treatment)]
        rows.append((alpha, *ends[0], *ends[1]))
    values = [_value(cell, level) for cell in (control, treatment)]
    return QuantilePhase(
        control.moments.count, values[0], treatment.moments.count, values[1], tuple(rows)
    )


def _value(cell: Cell, level: float) -> float:
    found = cell.sketch.quantile(level) if cell.sketch is not None else None
    return 0.0 if found is None else found


def _ends(
    cell: Cell, level: float, alpha: float, planned: int
) -> tuple[float | None, float | None]:
    """An arm's interval, widened by what the sketch may be wrong."""
    if cell.sketch is None:
        return None, None
    count = cell.sketch.count
    # Half of the planned units are in each arm, with as many requests a unit as now. How requests
    # of a unit cluster in the tail is not kept; the design effect of the mean stands for it.
    low, high = rank_interval(count, level, alpha, planned / 2, inflation(cell))
    return (
        cell.sketch.value_at(low) / (1 + ACCURACY) if low > 0 else None,
        cell.sketch.value_at(high) / (1 - ACCURACY) if high <= count else None,
    )
