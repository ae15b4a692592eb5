"""Everything that an experiment has measured, in constant memory; replicas' measurements merge.

A phase is a stretch of constant shares: a ramp begins the next one. Arms are compared within a
phase, so that a change of the shares while traffic changes cannot look like an effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiments.fields import Fields
from liveprune.server.experiments.metrics import METRICS, check_value
from liveprune.server.experiments.moments import Moments
from liveprune.server.experiments.sketch import Sketch
from liveprune.server.experiments.units import ClusterSums, UnitSample

VERSION = 1


@dataclass
class Cell:
    """One metric of one arm in one phase."""

    moments: Moments = field(default_factory=Moments)
    clusters: ClusterSums = field(default_factory=ClusterSums)
    sketch: Sketch | None = None
    """Of metrics with quantiles."""

    def add(self, unit: int, value: float) -> None:
        self.moments.add(value)
        self.clusters.add(unit, value)
        if self.sketch is not None:
            self.sketch.add(value)

    def merge(self, other: Cell) -> None:
        self.moments.merge(other.moments)
        self.clusters.merge(other.clusters)
        if self.sketch is not None and other.sketch is not None:
            self.sketch.merge(other.sketch)

    def to_json(self) -> dict[str, object]:
        return {
            "moments": self.moments.to_json(),
            "clusters": self.clusters.to_json(),
            "sketch": self.sketch.to_json() if self.sketch is not None else None,
        }

    @classmethod
    def from_json(cls, form: object) -> Cell:
        fields = Fields(form, "cell")
        sketch = fields.any("sketch")
        found = cls(
            Moments.from_json(fields.any("moments")),
            ClusterSums.from_json(fields.any("clusters")),
            None if sketch is None else Sketch.from_json(sketch),
        )
        fields.done()
        return found


@dataclass
class Phase:
    """A stretch of constant shares."""

    shares: dict[str, int]
    """Arm to millionths."""
    units: UnitSample = field(default_factory=UnitSample)
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    """Arm to metric to cell."""

    def cell(self, arm: str, metric: str) -> Cell:
        """The cell, made empty if it was not there."""
        cells = self.cells.setdefault(arm, {})
        if metric not in cells:
            cells[metric] = Cell(sketch=Sketch() if METRICS[metric].quantiles else None)
        return cells[metric]

    def to_json(self) -> dict[str, object]:
        return {
            "shares": self.shares,
            "units": self.units.to_json(),
            "cells": {
                arm: {name: cell.to_json() for name, cell in cells.items()}
                for arm, cells in self.cells.items()
            },
        }

    @classmethod
    def from_json(cls, form: object) -> Phase:
        fields = Fields(form, "phase")
        shares = Fields(fields.any("shares"), "phase: shares")
        found = cls({arm: shares.count(arm) for arm in shares.names()})
        found.units = UnitSample.from_json(fields.any("units"))
        for arm, cells in _object(fields, "cells").items():
            if not isinstance(cells, Mapping) or not set(cells) <= set(METRICS):
                raise fields.error("cells", cells, "an object of known metrics for each arm")
            found.cells[arm] = {name: Cell.from_json(cell) for name, cell in cells.items()}
        fields.done()
        return found


@dataclass
class Measurements:
    """All phases of an experiment, in order."""

    phases: list[Phase] = field(default_factory=list)

    def begin(self, shares: Mapping[str, int]) -> None:
        """Begin a phase: at the start, and whenever shares change."""
        self.phases.append(Phase(dict(shares)))

    def assigned(self, phase: int, unit: int, arm: str) -> None:
        """Count a unit when its request is assigned in phase number ``phase``: not when it ends.

        What happens to the request later must not decide whether it is counted, or a variant that
        loses requests would go unnoticed.

        Raises:
            ExperimentError: an unknown phase or arm.
        """
        self._phase(phase, arm).units.add(unit, arm)

    def finished(self, phase: int, unit: int, arm: str, values: Mapping[str, float]) -> None:
        """Add what was measured of a request that was assigned in phase number ``phase``.

        Raises:
            ExperimentError: an unknown phase or arm; a value that the metric cannot have. Nothing
                of the request is added then.
        """
        found = self._phase(phase, arm)
        checked = {name: check_value(name, value) for name, value in values.items()}
        for name, value in checked.items():
            found.cell(arm, name).add(unit, value)

    def merge(self, other: Measurements) -> None:
        """Take in what another replica measured, phase by phase.

        Raises:
            ExperimentError: the two disagree about the shares of a phase.
        """
        for i, theirs in enumerate(other.phases):
            if i == len(self.phases):
                self.begin(theirs.shares)
            mine = self.phases[i]
            if mine.shares != theirs.shares:
                raise ExperimentError(
                    f"phase {i}: found the shares {theirs.shares}, expected {mine.shares}"
                )
            mine.units.merge(theirs.units)
            for arm, cells in theirs.cells.items():
                for name, cell in cells.items():
                    mine.cell(arm, name).merge(cell)

    def to_json(self) -> dict[str, object]:
        return {"version": VERSION, "phases": [phase.to_json() for phase in self.phases]}

    @classmethod
    def from_json(cls, form: object) -> Measurements:
        """Read what ``to_json`` wrote.

        Raises:
            ExperimentError: damaged, or of an unknown version.
        """
        fields = Fields(form, "measurements")
        version = fields.any("version")
        if version != VERSION:
            raise fields.error("version", version, str(VERSION))
        found = cls([Phase.from_json(phase) for phase in fields.items("phases")])
        fields.done()
        return found

    def _phase(self, number: int, arm: str) -> Phase:
        if not 0 <= number < len(self.phases):
            raise ExperimentError(f"phase: found {number}, expected one of {len(self.phases)}")
        phase = self.phases[number]
        if arm not in phase.shares:
            raise ExperimentError(f"arm: found {arm!r}, expected one of {', '.join(phase.shares)}")
        return phase


def _object(fields: Fields, name: str) -> Mapping[str, object]:
    value = fields.any(name)
    if not isinstance(value, Mapping):
        raise fields.error(name, value, "an object")
    return value
