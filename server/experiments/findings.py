"""What is proven about each measure of a treatment arm, at the levels that a decision uses.

Any guardrail of any treatment arm may cause a roll-back, so their alpha is divided by how many
there are (Bonferroni). To ship, all must be proven at once; that needs no such division within an
arm (intersection-union test), only between arms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from liveprune.server.experiments.contrast import Contrast, Side
from liveprune.server.experiments.definition import Experiment
from liveprune.server.experiments.metrics import Guardrail, Measure


@dataclass(frozen=True)
class Finding:
    """One measure of one treatment arm."""

    arm: str
    measure: str
    role: Literal["primary", "guardrail"]
    state: Literal["better", "within", "worse", "unclear", "no data"]
    control: float | None
    treatment: float | None
    lower: float | None
    """Bounds of treatment minus control (for a relative margin: minus control times one plus the
    margin), each at the one-sided level that the decision uses; None: unbounded."""
    upper: float | None
    limit: float
    """What the bounds are compared with."""
    count: int
    """Values in the smaller arm."""


def rollback_alpha(experiment: Experiment) -> float:
    """One-sided level of one guardrail of one treatment arm."""
    return experiment.alpha / max(1, len(experiment.guardrails)) / len(experiment.treatments)


def ship_alpha(experiment: Experiment) -> float:
    """One-sided level of everything that must be proven before one treatment arm ships."""
    return experiment.alpha / len(experiment.treatments)


def findings_of(
    experiment: Experiment, arm: str, contrasts: Mapping[str, Contrast | None]
) -> list[Finding]:
    """Judge the primary measure and every guardrail of one treatment arm.

    Args:
        experiment: says what is measured, margins and levels.
        arm: a treatment arm.
        contrasts: label of the measure to contrast; None or missing: nothing measured yet.
    """
    found = []
    if (primary := experiment.primary) is not None:
        found.append(_primary(arm, primary, contrasts.get(primary.label), ship_alpha(experiment)))
    for guardrail in experiment.guardrails:
        contrast = contrasts.get(guardrail.label)
        found.append(
            _guarded(arm, guardrail, contrast, rollback_alpha(experiment), ship_alpha(experiment))
        )
    return found


def _primary(arm: str, measure: Measure, contrast: Contrast | None, alpha: float) -> Finding:
    if contrast is None:
        return Finding(arm, measure.label, "primary", "no data", None, None, None, None, 0.0, 0)
    lower, upper = (contrast.bound(side, 1.0, alpha) for side in ("lower", "upper"))
    better, worse = _proven(measure, lower, upper, 0.0)
    return Finding(
        arm,
        measure.label,
        "primary",
        "better" if better else "worse" if worse else "unclear",
        contrast.control,
        contrast.treatment,
        lower,
        upper,
        0.0,
        min(contrast.control_count, contrast.treatment_count),
    )


def _guarded(
    arm: str, guardrail: Guardrail, contrast: Contrast | None, rollback: float, ship: float
) -> Finding:
    measure = guardrail.measure
    sign = 1.0 if measure.better == "lower" else -1.0
    scale = 1.0 + sign * guardrail.margin if guardrail.relative else 1.0
    limit = 0.0 if guardrail.relative else sign * guardrail.margin
    if contrast is None:
        return Finding(arm, measure.label, "guardrail", "no data", None, None, None, None, limit, 0)
    harm: Side = "lower" if measure.better == "lower" else "upper"
    safe: Side = "upper" if measure.better == "lower" else "lower"
    found = {harm: contrast.bound(harm, scale, rollback), safe: contrast.bound(safe, scale, ship)}
    within, worse = _proven(measure, found["lower"], found["upper"], limit)
    return Finding(
        arm,
        measure.label,
        "guardrail",
        "worse" if worse else "within" if within else "unclear",
        contrast.control,
        contrast.treatment,
        found["lower"],
        found["upper"],
        limit,
        min(contrast.control_count, contrast.treatment_count),
    )


def _proven(
    measure: Measure, lower: float | None, upper: float | None, limit: float
) -> tuple[bool, bool]:
    """Whether the treatment is on the good, and on the bad side of the limit."""
    below = upper is not None and upper < limit
    above = lower is not None and lower > limit
    return (below, above) if measure.better == "lower" else (above, below)


def gain_of(measure: Measure, finding: Finding) -> float:
    """How much better the treatment's value is, in the metric's unit."""
    difference = (finding.treatment or 0.0) - (finding.control or 0.0)
    return -difference if measure.better == "lower" else difference


def say(finding: Finding) -> str:
    """A finding as a line for people."""
    if finding.state == "no data":
        return f"{finding.measure}: nothing measured in both arms yet"
    ends = ["unbounded" if end is None else f"{end:.4g}" for end in (finding.lower, finding.upper)]
    return (
        f"{finding.measure}: {finding.state}: {finding.treatment:.4g} against "
        f"{finding.control:.4g}, difference from {ends[0]} to {ends[1]}, limit {finding.limit:.4g}"
    )


def looks_worse(experiment: Experiment, finding: Finding) -> bool:
    """Whether a guardrail's values are beyond its margin, proven or not."""
    guardrail = next(x for x in experiment.guardrails if x.label == finding.measure)
    sign = 1.0 if guardrail.measure.better == "lower" else -1.0
    control, treatment = finding.control or 0.0, finding.treatment or 0.0
    margin = guardrail.margin * abs(control) if guardrail.relative else guardrail.margin
    return sign * (treatment - control) > margin
