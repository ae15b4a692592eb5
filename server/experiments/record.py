"""All the numbers that a decision rests on, and their JSON form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiments.contrast import (
    Contrast,
    contrast_from_json,
    contrast_to_json,
)
from liveprune.server.experiments.definition import Experiment, experiment_from
from liveprune.server.experiments.fields import Fields
from liveprune.server.experiments.findings import rollback_alpha, ship_alpha
from liveprune.server.experiments.measurements import Measurements
from liveprune.server.experiments.mismatch import UnitCounts
from liveprune.server.experiments.summary import contrast_of, unit_counts, units_by_arm

VERSION = 1


@dataclass(frozen=True)
class Record:
    """All that a decision rests on."""

    experiment: Experiment
    now: float
    """Seconds since the epoch, as are the three below."""
    started: float
    phase_started: float
    last_action: float | None
    shares: dict[str, int]
    """Arm to millionths, now."""
    units: dict[str, int]
    """Arm to distinct units."""
    unit_counts: tuple[UnitCounts, ...]
    """Of each phase."""
    earlier_mismatch_p: float
    """The smallest p-value of a mismatch that was ever seen; 1 at first."""
    contrasts: dict[str, dict[str, Contrast | None]]
    """Treatment arm to label of the measure to contrast; None: nothing measured yet."""

    def to_json(self) -> dict[str, Any]:
        """The form that ``record_from_json`` reads back to an equal record."""
        return {
            "version": VERSION,
            "experiment": self.experiment.to_json(),
            "now": self.now,
            "started": self.started,
            "phase_started": self.phase_started,
            "last_action": self.last_action,
            "shares": self.shares,
            "units": self.units,
            "unit_counts": [dataclasses.asdict(x) for x in self.unit_counts],
            "earlier_mismatch_p": self.earlier_mismatch_p,
            "contrasts": {
                arm: {
                    label: None if x is None else contrast_to_json(x)
                    for label, x in contrasts.items()
                }
                for arm, contrasts in self.contrasts.items()
            },
        }


def record_of(
    experiment: Experiment,
    measurements: Measurements,
    *,
    now: float,
    started: float,
    phase_started: float,
    last_action: float | None = None,
    earlier_mismatch_p: float = 1.0,
) -> Record:
    """Sum measurements up for a decision; times are in seconds since the epoch.

    Raises:
        ExperimentError: no phase has begun.
    """
    if not measurements.phases:
        raise ExperimentError(f"experiment {experiment.name}: found no phase, expected one")
    levels = (rollback_alpha(experiment), ship_alpha(experiment))
    wanted = (experiment.primary, *(g.measure for g in experiment.guardrails))
    measures = {x.label: x for x in wanted if x is not None}
    return Record(
        experiment,
        now,
        started,
        phase_started,
        last_action,
        dict(measurements.phases[-1].shares),
        units_by_arm(measurements),
        unit_counts(measurements),
        earlier_mismatch_p,
        {
            arm.name: {
                label: contrast_of(
                    measurements,
                    measure,
                    experiment.control,
                    arm.name,
                    experiment.planned_units,
                    levels,
                )
                for label, measure in measures.items()
            }
            for arm in experiment.treatments
        },
    )


def record_from_json(form: object) -> Record:
    """Read what ``Record.to_json`` wrote.

    Raises:
        ExperimentError: malformed, or of an unknown version.
    """
    fields = Fields(form, "record")
    version = fields.any("version")
    if version != VERSION:
        raise fields.error("version", version, str(VERSION))
    last = fields.any("last_action")
    found = Record(
        experiment_from(fields.any("experiment")),
        fields.number("now"),
        fields.number("started"),
        fields.number("phase_started"),
        None if last is None else Fields({"last_action": last}, "record").number("last_action"),
        _counts(fields.any("shares"), "shares"),
        _counts(fields.any("units"), "units"),
        tuple(_unit_counts(x) for x in fields.items("unit_counts")),
        fields.number("earlier_mismatch_p", low=0, high=1),
        _contrasts(fields),
    )
    fields.done()
    return found


def _counts(form: object, where: str) -> dict[str, int]:
    fields = Fields(form, f"record: {where}")
    return {name: fields.count(name) for name in fields.names()}


def _unit_counts(form: object) -> UnitCounts:
    fields = Fields(form, "record: unit_counts")
    found = UnitCounts(
        _counts(fields.any("counts"), "counts"),
        _counts(fields.any("shares"), "shares"),
        fields.count("level"),
    )
    fields.done()
    return found


def _contrasts(fields: Fields) -> dict[str, dict[str, Contrast | None]]:
    arms = Fields(fields.any("contrasts"), "record: contrasts")
    found: dict[str, dict[str, Contrast | None]] = {}
    for arm in arms.names():
        value = arms.any(arm)
        if not isinstance(value, Mapping):
            raise arms.error(arm, value, "an object")
        found[arm] = {
            label: None if x is None else contrast_from_json(x) for label, x in value.items()
        }
    return found
