"""The decision: a pure function of one record of numbers.

In this order:

- INVALID: units do not fall into arms by their shares (sample-ratio mismatch).
- ROLLBACK: a guardrail is proven worse than its margin allows.
- SHIP: the primary measure, if there is one, is proven better, and every guardrail is proven within
  its margin.
- HOLD: none of these, yet.

An arm without a share, rolled back or not begun, is judged but causes nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from liveprune.server.experiments.findings import Finding, findings_of, gain_of, looks_worse, say
from liveprune.server.experiments.mismatch import mismatch_p
from liveprune.server.experiments.record import Record, record_from_json

Verdict = Literal["INVALID", "ROLLBACK", "SHIP", "HOLD"]


@dataclass(frozen=True)
class Decision:
    """What follows from a record."""

    verdict: Verdict
    arm: str | None
    """Who is rolled back or shipped."""
    reasons: tuple[str, ...]
    actions: tuple[str, ...]
    """To carry out now; empty in a dry run."""
    withheld: tuple[str, ...]
    """Would be carried out but for the dry run or the cool-down."""
    mismatch_p: float
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def decide(record: Record) -> Decision:
    """Decide; the same record always gives the same decision."""
    experiment = record.experiment
    p = min(record.earlier_mismatch_p, mismatch_p(record.unit_counts))
    findings = tuple(
        finding
        for arm in experiment.treatments
        for finding in findings_of(experiment, arm.name, record.contrasts.get(arm.name, {}))
    )
    if p <= experiment.srm_alpha:
        counts = "; ".join(
            f"phase {i}: {x.counts} for shares {x.shares}" for i, x in enumerate(record.unit_counts)
        )
        reason = f"units do not fall into arms by their shares (p = {p:.2g}): {counts}"
        return _finish(record, "INVALID", None, (reason,), p, findings)
    worse = [
        x
        for x in findings
        if x.state == "worse" and x.role == "guardrail" and record.shares.get(x.arm)
    ]
    ready = [x for x in worse if _enough(record, x.arm, x.count, experiment.rollback_units)]
    if ready:
        arm = ready[0].arm
        reasons = tuple(say(x) for x in ready if x.arm == arm)
        return _finish(record, "ROLLBACK", arm, reasons, p, findings)
    missing = {
        arm.name: _missing(record, [x for x in findings if x.arm == arm.name], arm.name)
        for arm in experiment.treatments
        if record.shares.get(arm.name)
    }
    shippable = [arm for arm, reasons in missing.items() if not reasons]
    if shippable:
        aim = experiment.primary
        gain = {x.arm: gain_of(aim, x) for x in findings if aim and x.role == "primary"}
        arm = max(shippable, key=lambda name: gain.get(name, 0.0))  # the first, without an aim
        reasons = tuple(say(x) for x in findings if x.arm == arm)
        return _finish(record, "SHIP", arm, reasons, p, findings)
    held = tuple(f"{arm}: {reason}" for arm, reasons in missing.items() for reason in reasons)
    return _finish(record, "HOLD", None, held, p, findings)


def replay(form: object) -> Decision:
    """Decide once more from a record's JSON form.

    Raises:
        ExperimentError: the record is malformed.
    """
    return decide(record_from_json(form))


def _enough(record: Record, arm: str, count: int, minimum: int) -> bool:
    units = min(record.units.get(name, 0) for name in (arm, record.experiment.control))
    return min(units, count) >= minimum


def _missing(record: Record, findings: list[Finding], arm: str) -> list[str]:
    """What keeps an arm from being shipped."""
    experiment = record.experiment
    reasons = []
    elapsed = record.now - record.started
    if elapsed < experiment.minimum_seconds:
        reasons.append(
            f"{elapsed:.0f} s of at least {experiment.minimum_seconds:.0f} s have passed"
        )
    for finding in findings:
        wanted = "better" if finding.role == "primary" else "within"
        if finding.state != wanted:
            reasons.append(say(finding))
        elif not _enough(record, arm, finding.count, experiment.minimum_units):
            units = {name: record.units.get(name, 0) for name in (experiment.control, arm)}
            reasons.append(
                f"{finding.measure}: units {units} and {finding.count} values, expected "
                f"{experiment.minimum_units} of each in both arms"
            )
    return reasons


def _finish(
    record: Record,
    verdict: Verdict,
    arm: str | None,
    reasons: tuple[str, ...],
    p: float,
    findings: tuple[Finding, ...],
) -> Decision:
    experiment = record.experiment
    wanted = [
        action for action in _wanted(record, verdict, findings) if action in experiment.actions
    ]
    cooling = (
        record.last_action is not None
        and record.now - record.last_action < experiment.cool_down_seconds
    )
    # A roll-back never waits: the cool-down is there for what adds risk.
    waiting = [x for x in wanted if experiment.dry_run or (cooling and x in ("ramp", "promote"))]
    now = tuple(x for x in wanted if x not in waiting)
    return Decision(verdict, arm, reasons, now, tuple(waiting), p, findings)


def _wanted(record: Record, verdict: Verdict, findings: tuple[Finding, ...]) -> list[str]:
    experiment = record.experiment
    if verdict == "INVALID":
        return ["notify"]
    if verdict == "ROLLBACK":
        return ["notify", "rollback"]
    treated = sum(ppm for arm, ppm in record.shares.items() if arm != experiment.control)
    steps_left = any(step > treated for step in experiment.ramp)
    ramping = steps_left and "ramp" in experiment.actions
    wanted = ["notify"] if verdict == "SHIP" else []
    if verdict == "SHIP" and not ramping:
        wanted.append("promote")
    elif ramping and _may_ramp(record, findings):
        wanted.append("ramp")
    return wanted


def _may_ramp(record: Record, findings: tuple[Finding, ...]) -> bool:
    """The phase lasted, has units, and no guardrail looks worse, proven or not."""
    experiment = record.experiment
    lasted = record.now - record.phase_started >= experiment.minimum_seconds
    full = all(
        _enough(record, x.arm, x.count, experiment.rollback_units)
        and x.state != "worse"
        and (x.state == "within" or not looks_worse(experiment, x))
        for x in findings
        if x.role == "guardrail" and record.shares.get(x.arm)
    )
    enough = all(
        record.units.get(arm, 0) >= experiment.rollback_units
        for arm, share in record.shares.items()
        if share or arm == experiment.control
    )
    return lasted and enough and full
