"""What the routes about experiments do: check, start, look up, re-weigh, stop; and feedback."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from liveprune.pruning.errors import ConflictError
from liveprune.server.control_plane import ControlPlane
from liveprune.server.experiment_models import (
    DecisionBody,
    DecisionRecord,
    ExperimentBody,
    FeedbackBody,
)
from liveprune.server.experiment_views import ExperimentViews, decision_body, decision_record
from liveprune.server.experiment_worker import ExperimentWorker
from liveprune.server.experiments.definition import Experiment, experiment_from
from liveprune.server.experiments.fields import Fields
from liveprune.server.experiments.live import LiveExperiments
from liveprune.server.store.experiment_rows import StoredExperiment, UnknownExperimentError
from liveprune.server.store.store import Store


class ExperimentService:
    """Experiments as one server sees them."""

    def __init__(
        self,
        store: Store,
        live: LiveExperiments,
        worker: ExperimentWorker,
        control: ControlPlane,
        names: Sequence[str],
    ) -> None:
        """Args:
        store: of the model.
        live: what this process routes by and measures.
        worker: keeps both in step.
        control: the live variants.
        names: bare names that the model is served under; the first is meant where none is named.
        """
        self._store, self._live, self._worker = store, live, worker
        self._control, self._names = control, tuple(names)
        self._views = ExperimentViews(store)

    async def check(self, definition: Mapping[str, Any]) -> Experiment:
        """The experiment that ``start`` would start now.

        Raises:
            ExperimentError: the definition is wrong, or it would own units of another one.
            ConflictError: a variant is not live here, the name was used before, or too many run.
        """
        experiment = self._read(definition)
        await self._check_live(experiment)
        await asyncio.to_thread(self._store.experiments.check, experiment)
        return experiment

    async def start(self, definition: Mapping[str, Any], *, key: str | None) -> ExperimentBody:
        """Start or schedule an experiment; the same ``key`` gives the same experiment.

        Raises:
            ExperimentError: see ``check``.
            ConflictError: see ``check``; or the key came with another definition.
        """
        experiment = self._read(definition)
        rows = self._store.experiments
        if key is None or await asyncio.to_thread(rows.by_key, key) is None:
            await self._check_live(experiment)
        found = await asyncio.to_thread(lambda: rows.add(experiment, key=key))
        await self._worker.refresh()
        return await self._shown(found)

    async def newest(self) -> list[ExperimentBody]:
        """The newest first."""
        return await asyncio.to_thread(self._all)

    async def get(self, name: str) -> ExperimentBody:
        """One experiment; UnknownExperimentError if there is none."""
        return await self._shown(await self._row(name))

    async def move(self, name: str, weights: Mapping[str, float]) -> ExperimentBody:
        """Begin a phase with new shares.

        Raises:
            UnknownExperimentError: there is no such experiment.
            ExperimentError: not all arms are named, or the weights do not sum to 1.
            ConflictError: it does not run.
        """
        row = await self._row(name)
        arms = row.definition["arms"]
        fields = Fields(weights, f"experiment {name}: weights")
        moved = [{**arm, "weight": fields.number(arm["name"])} for arm in arms]
        fields.done()
        # A ramp that begins below them is no error: it goes on from where the shares are.
        shares = experiment_from({**row.definition, "arms": moved, "ramp": []}).shares
        found = await asyncio.to_thread(self._store.experiments.move, name, shares)
        await self._worker.refresh()
        return await self._shown(found)

    async def stop(self, name: str, reason: str) -> ExperimentBody:
        """End an experiment.

        Raises:
            UnknownExperimentError: there is no such experiment.
            ConflictError: it has ended.
        """
        why = reason or "stopped by an operator"
        found = await asyncio.to_thread(self._store.experiments.stop, name, why)
        await self._worker.refresh()
        return await self._shown(found)

    async def decision(self, name: str) -> DecisionBody:
        """The newest decision; UnknownExperimentError before the first."""
        await self._row(name)
        found = await asyncio.to_thread(self._store.decisions.newest, name)
        if found is None:
            raise UnknownExperimentError(
                f"experiment {name}: found no decision yet, expected the first one soon after its "
                "start"
            )
        return decision_body(found)

    async def decisions(self, name: str) -> list[DecisionBody]:
        """The oldest first."""
        await self._row(name)
        found = await asyncio.to_thread(self._store.decisions.of, name)
        return [decision_body(x) for x in found]

    async def decision_record(self, name: str, number: int) -> DecisionRecord:
        """One decision with its numbers; UnknownExperimentError if there is none."""
        await self._row(name)
        return decision_record(await asyncio.to_thread(self._store.decisions.get, name, number))

    async def feedback(self, response_id: str, score: float) -> FeedbackBody:
        """Count a client's score of an answer, once.

        Raises:
            UnknownExperimentError: no running experiment gave it, it was scored, or it is too old.
            ConflictError: its experiment has ended.
        """
        found = await self._worker.take_answer(response_id)
        if not self._measures(found.experiment, found.phase):
            await self._worker.refresh()  # another replica gave the answer, in a phase that is new
        if not self._measures(found.experiment, found.phase):
            raise ConflictError(
                f"answer {response_id!r}: its experiment {found.experiment} does not run here, "
                "expected a running one"
            )
        self._live.finished(found, {"score": score})
        return FeedbackBody(experiment=found.experiment, arm=found.arm)

    def _measures(self, name: str, phase: int) -> bool:
        measured = self._live.measured(name)
        return measured is not None and phase < len(measured.phases)

    def _read(self, definition: Mapping[str, Any]) -> Experiment:
        experiment = experiment_from({"model": self._names[0], **definition})
        if experiment.model not in self._names:
            fields = Fields({}, f"experiment {experiment.name}")
            raise fields.error("model", experiment.model, f"one of {', '.join(self._names)}")
        # The alias is one, whichever of its names a request has.
        return dataclasses.replace(experiment, model=self._names[0])

    async def _check_live(self, experiment: Experiment) -> None:
        states = {view.tag: view.state for view in await self._control.variants()}
        for arm in experiment.arms:
            state = states.get(arm.variant, "unknown")
            if state != "live":
                raise ConflictError(
                    f"experiment {experiment.name}: arm {arm.name}: the variant {arm.variant!r} is "
                    f"{state} here, expected live: `liveprune variants add PLAN --name "
                    f"{arm.variant}` makes it so"
                )

    async def _row(self, name: str) -> StoredExperiment:
        return await asyncio.to_thread(self._store.experiments.get, name)

    async def _shown(self, row: StoredExperiment) -> ExperimentBody:
        (found,) = await asyncio.to_thread(self._views.of, [row], self._paused())
        return found

    def _all(self) -> list[ExperimentBody]:
        return self._views.of(self._store.experiments.newest(), self._paused())

    def _paused(self) -> dict[str, str]:
        return {**self._live.paused, **self._worker.unreadable}
