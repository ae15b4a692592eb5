"""The experiments that one process routes by and measures, in memory.

``LiveExperiments`` is asked for every request to an alias, and told what came of it. It lives in
the event loop of the API server: no locks. What it knows comes from the store, and what it measures
goes there; both are the work of ``server.experiment_worker``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from liveprune.server.experiments.assignment import Allocation, allocate, assign, unit_of
from liveprune.server.experiments.definition import Experiment
from liveprune.server.experiments.measurements import Measurements
from liveprune.server.experiments.units import unit_hash

MOST_ANSWERS = 10_000
"""Answers whose ids are held until the next flush; the oldest go first."""


@dataclass(frozen=True)
class Running:
    """A running experiment as the store has it."""

    experiment: Experiment
    history: tuple[Mapping[str, int], ...]
    """Shares of each phase, in millionths; the last is now's."""
    phase_started: float
    """Seconds since the epoch."""

    @cached_property
    def allocation(self) -> Allocation:
        return allocate(self.history)


@dataclass(frozen=True)
class Assignment:
    """What a request was given; kept until it is measured."""

    experiment: str
    arm: str
    variant: str
    """Tag of the variant that answers."""
    shadow: str | None
    """Tag of the variant that gets a copy, and whose measures are the arm's."""
    phase: int
    unit: int
    """64-bit hash."""
    counted: bool
    """False in the warm-up of a phase."""
    fidelity: float
    """Chance that the answer shall be scored again."""


class LiveExperiments:
    """Routing and measuring for the experiments on one model's names.

    Attributes:
        paused: experiment to why this process routes nothing by it.
    """

    def __init__(self, salt: bytes, now: Callable[[], float]) -> None:
        """``salt``: the secret that all replicas share; ``now``: seconds since the epoch."""
        self._salt = salt
        self._now = now
        self._running: dict[str, Running] = {}
        self._measurements: dict[str, Measurements] = {}
        self._answers: dict[str, Assignment] = {}
        self.paused: dict[str, str] = {}

    def install(
        self, running: Sequence[Running], measured: Mapping[str, Measurements] | None = None
    ) -> None:
        """Route by exactly these from now on.

        Args:
            running: in the order of their start.
            measured: what this replica had measured of them before a restart; otherwise what is
                here is kept.
        """
        self._running = {x.experiment.name: x for x in running}
        kept = {**self._measurements, **(measured or {})}
        self._measurements = {name: kept.get(name, Measurements()) for name in self._running}
        for name, found in self._running.items():
            phases = self._measurements[name].phases
            for shares in found.history[len(phases) :]:
                self._measurements[name].begin(shares)
        self.paused = {name: why for name, why in self.paused.items() if name in self._running}

    @property
    def running(self) -> Collection[Running]:
        return self._running.values()

    def measured(self, name: str) -> Measurements | None:
        """What this process measured, phases before a restart included; None: it is not running."""
        return self._measurements.get(name)

    def control_of(self, name: str) -> str | None:
        """Tag of the control arm's variant; None: the experiment is not running."""
        running = self._running.get(name)
        if running is None:
            return None
        experiment = running.experiment
        return next(arm.variant for arm in experiment.arms if arm.name == experiment.control)

    def key_id(self, key: str) -> str:
        """What identifies an API key to those who do not know it: the same on all replicas."""
        return hashlib.blake2b(
            key.encode(), key=self._salt, digest_size=16, person=b"api-key"
        ).hexdigest()

    def route(
        self,
        model: str,
        headers: Mapping[str, str],
        body: Mapping[str, object],
        key_id: str | None,
        request_id: str,
        live: Collection[str],
    ) -> Assignment | None:
        """The arm of a request to an alias, counted; None: no experiment has it.

        An experiment of which some variant is not live here is left alone, whole: to leave out one
        arm only would make the arms' units differ.

        Args:
            model: the alias.
            headers: names in small letters.
            body: fields of the request.
            key_id: identifies the API key and is not the key.
            request_id: the client's own where it sent one.
            live: tags of the live variants.
        """
        mine = [x for x in self._running.values() if x.experiment.model == model]
        if not mine:
            return None
        unit = unit_of(mine[0].experiment.unit, headers, body, key_id, request_id)
        pairs = [(x.experiment, x.allocation) for x in mine]
        found = assign(self._salt, pairs, model, unit)
        if found is None:
            return None
        experiment, name = found
        missing = sorted({arm.variant for arm in experiment.arms} - set(live))
        if missing:
            self.paused[experiment.name] = f"not live here: {', '.join(missing)}"
            return None
        self.paused.pop(experiment.name, None)
        return self._assigned(self._running[experiment.name], name, unit)

    def _assigned(self, running: Running, name: str, unit: str) -> Assignment:
        experiment, phase = running.experiment, len(running.history) - 1
        arms = {arm.name: arm for arm in experiment.arms}
        arm = arms[name]
        hashed = unit_hash(self._salt, experiment.name, unit)
        counted = self._now() - running.phase_started >= experiment.warm_up_seconds
        if counted:
            self._measurements[experiment.name].assigned(phase, hashed, name)
        return Assignment(
            experiment.name,
            name,
            arms[experiment.control].variant if arm.shadow else arm.variant,
            arm.variant if arm.shadow else None,
            phase,
            hashed,
            counted,
            experiment.fidelity,
        )

    def finished(self, assignment: Assignment, values: Mapping[str, float]) -> None:
        """Add what was measured of a request, at once or later (scores, fidelity).

        Nothing is added if it was not counted, or its experiment has ended.

        Raises:
            ExperimentError: a value that its metric cannot have.
        """
        measured = self._measurements.get(assignment.experiment)
        if measured is not None and assignment.counted:
            measured.finished(assignment.phase, assignment.unit, assignment.arm, values)

    def answered(self, response_id: str, assignment: Assignment) -> None:
        """Remember which arm gave an answer, for feedback."""
        if not assignment.counted:
            return
        self._answers.pop(response_id, None)
        self._answers[response_id] = assignment
        while len(self._answers) > MOST_ANSWERS:
            del self._answers[next(iter(self._answers))]

    def answer(self, response_id: str) -> Assignment | None:
        """Which arm gave an answer that is not in the store yet."""
        return self._answers.get(response_id)

    def answers(self) -> dict[str, Assignment]:
        """Answers that are not in the store yet, by response id, the oldest first."""
        return dict(self._answers)

    def forget_answers(self, answers: Mapping[str, Assignment]) -> None:
        """Let go of answers: the store has them, or they are scored."""
        for response_id, assignment in answers.items():
            if self._answers.get(response_id) is assignment:
                del self._answers[response_id]

    def needed_variants(self) -> dict[str, str]:
        """Tag to the experiment that routes only while this variant is live here."""
        return {
            arm.variant: name
            for name, found in self._running.items()
            for arm in found.experiment.arms
        }
