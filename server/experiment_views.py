"""Experiments as the admin API shows them: rows, measurements of all replicas, decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiment_models import (
    ArmBody,
    DecisionBody,
    DecisionRecord,
    ExperimentBody,
    MetricBody,
)
from liveprune.server.experiments.definition import PPM
from liveprune.server.experiments.measurements import Cell, Measurements
from liveprune.server.experiments.summary import units_by_arm
from liveprune.server.store.decisions import Promotion, StoredDecision
from liveprune.server.store.experiment_rows import StoredExperiment, merged
from liveprune.server.store.store import Store


@dataclass(frozen=True)
class _Shown:
    """What takes long to make, and what it was made from."""

    stamp: object
    arms: list[ArmBody]
    decision: DecisionBody | None
    problem: str | None


class ExperimentViews:
    """Makes the bodies; what has not changed in the store is made once. Calls block."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._shown: dict[str, _Shown] = {}

    def of(
        self, rows: Sequence[StoredExperiment], paused: Mapping[str, str]
    ) -> list[ExperimentBody]:
        """Bodies in the order of the rows; ``paused``: why this replica routes nothing by some."""
        updated = self._store.measurements.updated()
        decided = self._store.decisions.newest_ids()
        pending: dict[str, list[Promotion]] = {}
        for promotion in self._store.decisions.promotions():
            pending.setdefault(promotion.experiment, []).append(promotion)
        found = []
        for row in rows:
            stamp = (row.version, updated.get(row.name), decided.get(row.name))
            shown = self._shown.get(row.name)
            if shown is None or shown.stamp != stamp:
                shown = self._shown[row.name] = self._make(row, stamp)
            problem = shown.problem or paused.get(row.name)
            found.append(_body(row, shown, problem, pending.get(row.name, ())))
        return found

    def _make(self, row: StoredExperiment, stamp: object) -> _Shown:
        problem = None
        try:
            measured = merged(row, self._store.measurements.of(row.name).values())
        except ExperimentError as error:
            measured, problem = Measurements(), f"measurements cannot be read: {error}"
        newest = self._store.decisions.newest(row.name)
        decision = None if newest is None else decision_body(newest)
        return _Shown(stamp, _arms(row, measured), decision, problem)


def decision_body(found: StoredDecision) -> DecisionBody:
    """A decision without its record."""
    return DecisionBody.model_validate({"id": found.id, "time": found.time, **found.decision})


def decision_record(found: StoredDecision) -> DecisionRecord:
    """A decision with its record."""
    fields = {"id": found.id, "time": found.time, **found.decision, "record": found.record}
    return DecisionRecord.model_validate(fields)


def _body(
    row: StoredExperiment, shown: _Shown, paused: str | None, pending: Sequence[Promotion]
) -> ExperimentBody:
    waits = [f"{x.replica} still swaps to {x.variant} ({x.error or 'soon'})" for x in pending]
    return ExperimentBody(
        name=row.name,
        state=row.state.value,
        definition=dict(row.definition),
        created=row.created,
        started=row.started,
        ended=row.ended,
        reason="; ".join([row.reason, *waits]).strip("; ") or None,
        paused=paused if row.ended is None else None,
        phase=len(row.history) - 1,
        phase_started=row.phase_started,
        arms=shown.arms,
        decision=shown.decision,
    )


def _arms(row: StoredExperiment, measured: Measurements) -> list[ArmBody]:
    units, shares = units_by_arm(measured), row.shares[-1]
    arms = []
    for arm in row.definition["arms"]:
        metrics = {
            name: _metric(cell) for name, cell in sorted(_cells(measured, arm["name"]).items())
        }
        arms.append(
            ArmBody(
                name=arm["name"],
                variant=arm["variant"],
                share=shares.get(arm["name"], 0) / PPM,
                shadow=arm["shadow"],
                units=units.get(arm["name"], 0),
                requests=max((x.count for x in metrics.values()), default=0),
                metrics=metrics,
            )
        )
    return arms


def _cells(measured: Measurements, arm: str) -> dict[str, Cell]:
    """The metrics of an arm, over all phases."""
    whole = Measurements()
    whole.begin({arm: PPM})
    for phase in measured.phases:
        for name, cell in phase.cells.get(arm, {}).items():
            whole.phases[0].cell(arm, name).merge(cell)
    return whole.phases[0].cells.get(arm, {})


def _metric(cell: Cell) -> MetricBody:
    levels: dict[str, Any] = {}
    if cell.sketch is not None:
        quantiles = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        levels = {name: cell.sketch.quantile(level) for name, level in quantiles.items()}
    return MetricBody(count=cell.moments.count, mean=cell.moments.mean, **levels)
