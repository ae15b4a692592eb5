"""An experiment as the store has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy.engine import Connection, RowMapping

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiments.definition import Experiment, experiment_from
from liveprune.server.experiments.live import Running
from liveprune.server.experiments.measurements import Measurements

Clock = Callable[[Connection], float]
"""Seconds since 1970, on which all replicas agree."""


class ExperimentState(StrEnum):
    """Of an experiment; it ends in one of the last three."""

    SCHEDULED = "scheduled"
    RUNNING = "running"
    STOPPED = "stopped"
    SHIPPED = "shipped"
    ROLLED_BACK = "rolled_back"


ACTIVE = (ExperimentState.SCHEDULED, ExperimentState.RUNNING)


class UnknownExperimentError(ExperimentError):
    """There is no such experiment, decision, or answer to be scored."""


@dataclass(frozen=True)
class StoredExperiment:
    """One row."""

    name: str
    definition: Mapping[str, Any]
    """As ``Experiment.to_json`` gives it."""
    state: ExperimentState
    created: float
    """Seconds since 1970, as all times here."""
    started: float | None
    ended: float | None
    reason: str
    """Why it ended."""
    history: tuple[Mapping[str, Any], ...]
    """``{"shares": arm to millionths, "time"}`` of each phase."""
    last_action: float | None
    mismatch_p: float
    """The smallest that was ever seen."""
    version: int
    request_key: str | None
    """Of the request that made it, where it had one."""

    @property
    def shares(self) -> tuple[dict[str, int], ...]:
        """Arm to millionths, of each phase."""
        return tuple(dict(phase["shares"]) for phase in self.history)

    @property
    def phase_started(self) -> float | None:
        return None if self.started is None else float(self.history[-1]["time"])

    @property
    def experiment(self) -> Experiment:
        """Raises ExperimentError if another release wrote what this one cannot read."""
        return experiment_from(self.definition)


def phase_of(shares: Mapping[str, int], moment: float) -> dict[str, Any]:
    """An entry of ``StoredExperiment.history``."""
    return {"shares": dict(shares), "time": moment}


def experiment_of(row: RowMapping) -> StoredExperiment:
    """From a row of the table."""
    values = {name: row[name] for name in StoredExperiment.__dataclass_fields__}
    values |= {"state": ExperimentState(row["state"]), "history": tuple(row["history"])}
    return StoredExperiment(**values)


def read_running(found: StoredExperiment) -> Running:
    """A row as requests are routed by it.

    Raises:
        ExperimentError: its definition or its history is damaged, or of another release.
    """
    running = Running(found.experiment, found.shares, found.phase_started or 0.0)
    arms, in_history = set(running.experiment.shares), set(running.allocation.shares())
    if not in_history <= arms:
        raise ExperimentError(
            f"experiment {found.name}: found shares of {', '.join(sorted(in_history - arms))}, "
            f"expected arms only: {', '.join(sorted(arms))}"
        )
    return running


def merged(found: StoredExperiment, forms: Iterable[object]) -> Measurements:
    """What all replicas have measured, phases without measurements included.

    Args:
        found: the experiment.
        forms: of each replica, as ``Measurements.to_json`` gives it.

    Raises:
        ExperimentError: one is damaged, or is not of this experiment's history.
    """
    whole = Measurements()
    for shares in found.shares:
        whole.begin(shares)
    for form in forms:
        whole.merge(Measurements.from_json(form))
    return whole
