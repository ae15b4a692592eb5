"""What an experiment is: read from JSON once, checked, and frozen.

A weight is a share of the experiment's traffic. Inside, shares are whole millionths (``ppm``), so
that every process computes the same boundaries.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiments.fields import Fields
from liveprune.server.experiments.metrics import Guardrail, Measure

PPM = 1_000_000
HEADER = "x-liveprune-unit"
UNIT_CHAIN = (f"header:{HEADER}", "body:user", "body:prompt_cache_key", "api-key", "request-id")
ACTIONS = ("notify", "rollback", "ramp", "promote")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SOURCE = re.compile(r"header:[A-Za-z0-9-]+|body:[A-Za-z0-9_]+|api-key|request-id")


@dataclass(frozen=True)
class Arm:
    """A variant that gets a share of the traffic."""

    name: str
    variant: str
    """Tag of the variant; ``full`` is the base model."""
    ppm: int
    """Share at the start, in millionths."""
    shadow: bool = False
    """The control arm answers this arm's units; the variant gets copies, whose answers are only
    measured."""


@dataclass(frozen=True)
class Experiment:
    """A weighted split of an alias's traffic over variants."""

    name: str
    model: str
    """The alias that is split."""
    arms: tuple[Arm, ...]
    control: str
    """Name of the arm that the others are compared with."""
    primary: Measure | None
    """None: what the treatment saves is known without measuring (memory), so that it ships once all
    guardrails hold."""
    guardrails: tuple[Guardrail, ...]
    unit: tuple[str, ...] = UNIT_CHAIN
    """Where a request's unit is looked for, in order."""
    traffic: tuple[int, int] = (0, PPM)
    """The layer [start, end) of the alias's units that this experiment owns, in millionths."""
    alpha: float = 0.05
    srm_alpha: float = 0.001
    minimum_units: int = 200
    """In each arm, before SHIP."""
    rollback_units: int = 50
    """In each arm, before ROLLBACK."""
    planned_units: int = 2000
    """Over both arms; intervals are narrowest there, and valid everywhere."""
    minimum_seconds: float = 3600.0
    """Before SHIP."""
    cool_down_seconds: float = 600.0
    """No action so soon after the last one."""
    warm_up_seconds: float = 60.0
    """What is measured so soon after a start or a ramp is thrown away."""
    start: float | None = None
    """Seconds since the epoch."""
    end: float | None = None
    actions: tuple[str, ...] = ("notify",)
    ramp: tuple[int, ...] = ()
    """Shares of all treatment arms together at each step, in millionths, rising."""
    fidelity: float = 0.0
    """Share of the answers that are scored again, teacher-forced, against the reference."""
    dry_run: bool = False

    @property
    def treatments(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.name != self.control)

    @property
    def shares(self) -> dict[str, int]:
        """Arm to millionths, at the start."""
        return {arm.name: arm.ppm for arm in self.arms}

    def ramped(self, ppm: int) -> dict[str, int]:
        """Shares when all treatment arms together get ``ppm``, in their present proportion."""
        shares = _millionths(
            [arm.ppm for arm in self.treatments], ppm, sum(a.ppm for a in self.treatments)
        )
        found = dict(zip((arm.name for arm in self.treatments), shares, strict=True))
        return {arm.name: found.get(arm.name, PPM - ppm) for arm in self.arms}

    def to_json(self) -> dict[str, Any]:
        """The form that ``experiment_from`` reads back to an equal experiment."""
        return dataclasses.asdict(self) | {
            "arms": [
                {
                    "name": arm.name,
                    "variant": arm.variant,
                    "weight": arm.ppm / PPM,
                    "shadow": arm.shadow,
                }
                for arm in self.arms
            ],
            "primary": None if self.primary is None else dataclasses.asdict(self.primary),
            "guardrails": [
                dataclasses.asdict(x.measure) | {"margin": x.margin, "relative": x.relative}
                for x in self.guardrails
            ],
            "unit": list(self.unit),
            "traffic": [self.traffic[0] / PPM, self.traffic[1] / PPM],
            "actions": list(self.actions),
            "ramp": [step / PPM for step in self.ramp],
        }


def experiment_from(form: object) -> Experiment:
    """Check and read an experiment.

    Raises:
        ExperimentError: names the field, what was found and what was expected.
    """
    fields = Fields(form, "experiment")
    name = fields.text("name")
    if not _NAME.fullmatch(name):
        raise fields.error("name", name, "letters, digits, '.', '_' and '-', at most 63")
    fields.where = f"experiment {name}"
    model = fields.text("model")
    arms = _arms(fields.items("arms"), fields)
    control = fields.text("control")
    if control not in {arm.name for arm in arms}:
        raise fields.error("control", control, f"one of {', '.join(arm.name for arm in arms)}")
    if all(arm.ppm == 0 for arm in arms if arm.name != control):
        raise fields.error("arms", "no weight outside the control arm", "at least one with weight")
    if any(arm.shadow for arm in arms if arm.name == control):
        raise fields.error("arms", f"the control arm {control} as a shadow", "one that answers")
    aim = fields.any("primary")
    primary = None if aim is None else _measure(aim, f"{fields.where}: primary")
    guardrails = tuple(
        _guardrail(item, f"{fields.where}: guardrail {i}")
        for i, item in enumerate(fields.items("guardrails", ()), 1)
    )
    if primary is None and not guardrails:
        raise fields.error("primary", None, "a measure, or guardrails to be held without one")
    labels = [x.label for x in guardrails]
    for label in labels:
        if labels.count(label) > 1:
            raise fields.error("guardrails", f"{label} {labels.count(label)} times", "each once")
    default = Experiment(name, model, arms, control, primary, guardrails)
    found = dataclasses.replace(
        default,
        unit=_chain(fields),
        traffic=_traffic(fields),
        alpha=fields.number("alpha", default.alpha, low=1e-6, high=0.5),
        srm_alpha=fields.number("srm_alpha", default.srm_alpha, low=1e-9, high=0.5),
        minimum_units=fields.count("minimum_units", default.minimum_units, low=1),
        rollback_units=fields.count("rollback_units", default.rollback_units, low=1),
        planned_units=fields.count("planned_units", default.planned_units, low=1),
        minimum_seconds=fields.number("minimum_seconds", default.minimum_seconds, low=0),
        cool_down_seconds=fields.number("cool_down_seconds", default.cool_down_seconds, low=0),
        warm_up_seconds=fields.number("warm_up_seconds", default.warm_up_seconds, low=0),
        start=_moment(fields, "start"),
        end=_moment(fields, "end"),
        actions=_actions(fields),
        ramp=_ramp(fields, sum(arm.ppm for arm in arms if arm.name != control)),
        fidelity=fields.number("fidelity", default.fidelity, low=0, high=1),
        dry_run=fields.flag("dry_run", default=default.dry_run),
    )
    fields.done()
    if found.start is not None and found.end is not None and found.end <= found.start:
        raise fields.error("end", found.end, f"a moment after the start, {found.start}")
    return found


def check_exclusive(experiments: Sequence[Experiment]) -> None:
    """Refuse experiments on one alias that would own the same units.

    Raises:
        ExperimentError: names the two experiments, and the traffic of each or, where they look for
            units in different places, the chain of each.
    """
    for i, one in enumerate(experiments):
        for other in experiments[:i]:
            if one.model != other.model:
                continue
            if one.unit != other.unit:
                raise ExperimentError(
                    f"experiment {one.name}: unit: found {', '.join(one.unit)}, expected that of "
                    f"experiment {other.name} on the same model, {', '.join(other.unit)}"
                )
            (a, b), (c, d) = one.traffic, other.traffic
            if max(a, c) < min(b, d):
                raise ExperimentError(
                    f"experiment {one.name}: traffic: found [{a / PPM:g}, {b / PPM:g}) of "
                    f"{one.model}, expected a range apart from [{c / PPM:g}, {d / PPM:g}), which "
                    f"experiment {other.name} owns"
                )


def _arms(items: Sequence[object], fields: Fields) -> tuple[Arm, ...]:
    arms: list[Arm] = []
    weights: list[float] = []
    for i, item in enumerate(items, 1):
        arm = Fields(item, f"{fields.where}: arm {i}")
        name = arm.text("name")
        if not _NAME.fullmatch(name) or name in {other.name for other in arms}:
            raise arm.error("name", name, "a new name of letters, digits, '.', '_' and '-'")
        shadow = arm.flag("shadow", default=False)
        arms.append(Arm(name, arm.text("variant"), 0, shadow))
        weights.append(arm.number("weight", low=0, high=1))
        arm.done()
    if len(arms) < 2:
        raise fields.error("arms", len(arms), "at least two arms")
    if abs(sum(weights) - 1) > 1e-6:
        raise fields.error("arms", f"weights that sum to {sum(weights):g}", "a sum of 1")
    shares = _millionths(weights, PPM, sum(weights))
    return tuple(
        dataclasses.replace(arm, ppm=share) for arm, share in zip(arms, shares, strict=True)
    )


def _millionths(weights: Sequence[float], total: int, of: float) -> list[int]:
    """Share ``total`` out in proportion, the largest remainders first, so that it sums exactly."""
    exact = [weight / of * total for weight in weights]
    shares = [int(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _measure(form: object, where: str) -> Measure:
    fields = Fields(form, where)
    measure = _measure_of(fields)
    fields.done()
    return measure


def _measure_of(fields: Fields) -> Measure:
    metric, statistic = fields.any("metric"), fields.any("statistic", "mean")
    try:
        return Measure.of(metric, statistic, fields.any("better"))
    except ExperimentError as error:
        raise ExperimentError(f"{fields.where}: {error}") from error


def _guardrail(form: object, where: str) -> Guardrail:
    fields = Fields(form, where)
    measure = _measure_of(fields)
    relative = fields.flag("relative", default=False)
    margin = fields.number("margin", low=0)
    if relative and measure.better == "higher" and margin >= 1:
        raise fields.error("margin", margin, "less than 1: more than everything cannot be lost")
    fields.done()
    return Guardrail(measure, margin, relative)


def _chain(fields: Fields) -> tuple[str, ...]:
    chain = fields.items("unit", UNIT_CHAIN)
    for source in chain:
        if not isinstance(source, str) or not _SOURCE.fullmatch(source):
            raise fields.error(
                "unit", source, "'header:NAME', 'body:FIELD', 'api-key' or 'request-id'"
            )
    if not chain or chain[-1] != "request-id":
        raise fields.error("unit", chain, "a list that ends in 'request-id', which all have")
    return tuple(chain)


def _traffic(fields: Fields) -> tuple[int, int]:
    ends = fields.items("traffic", (0, 1))
    if len(ends) != 2 or not _numeric(ends) or not 0 <= ends[0] < ends[1] <= 1:
        raise fields.error("traffic", ends, "[start, end] with 0 <= start < end <= 1")
    return round(ends[0] * PPM), round(ends[1] * PPM)


def _moment(fields: Fields, name: str) -> float | None:
    value = fields.any(name)
    if value is None or _numeric([value]):
        return None if value is None else float(value)
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        moment = None
    if moment is None or moment.tzinfo is None:
        raise fields.error(
            name, value, "seconds since the epoch, or a time such as 2026-01-31T08:00:00+00:00"
        )
    return moment.timestamp()


def _actions(fields: Fields) -> tuple[str, ...]:
    actions = fields.items("actions", ("notify",))
    for action in actions:
        if action not in ACTIONS:
            raise fields.error("actions", action, f"some of {', '.join(ACTIONS)}")
    return tuple(action for action in ACTIONS if action in actions)


def _ramp(fields: Fields, first: int) -> tuple[int, ...]:
    steps = fields.items("ramp", ())
    found = tuple(round(x * PPM) for x in steps) if _numeric(steps) else ()
    rising = all(a < b for a, b in zip((first, *found), found, strict=False))
    if len(found) != len(steps) or not rising or (found and found[-1] > PPM):
        raise fields.error(
            "ramp", steps, f"shares that rise from the arms' {first / PPM:g} to at most 1"
        )
    return found


def _numeric(values: Sequence[object]) -> bool:
    return all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in values
    )
