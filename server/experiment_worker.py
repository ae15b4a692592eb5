"""Keeps a process's experiments and the store in step, and decides.

At each look it writes what was measured here, reads which experiments run, and, where this process
holds the lease on one, decides. What the store says is then routed by; so starts, ramps and stops
of other replicas take effect here at the next look. While the store is away the experiments go on
as they are, and what is measured stays in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from typing import Any

from liveprune.pruning.errors import ExperimentError, LiveprunError, StoreError
from liveprune.server.experiment_promotion import Promoter
from liveprune.server.experiments.actions import Outcome, outcome_of
from liveprune.server.experiments.decision import Decision, decide
from liveprune.server.experiments.live import Assignment, LiveExperiments, Running
from liveprune.server.experiments.record import record_of
from liveprune.server.store.experiment_rows import StoredExperiment, merged, read_running
from liveprune.server.store.measurements import MOST_ANSWERS
from liveprune.server.store.store import Store

INTERVAL = 10.0
"""Seconds between two looks."""
LEASE_LOOKS = 3.0
"""Looks without a sign of life after which another replica decides."""

logger = logging.getLogger("liveprune.experiments")


class ExperimentWorker:
    """Runs in the server's event loop, from ``start`` to ``stop``.

    Attributes:
        unreadable: experiments that run, and why they cannot here.
    """

    def __init__(
        self,
        store: Store,
        live: LiveExperiments,
        promoter: Promoter,
        *,
        interval: float = INTERVAL,
        most_answers: int = MOST_ANSWERS,
    ) -> None:
        """Args:
        store: of the model.
        live: what requests are routed by.
        promoter: swaps to winners.
        interval: seconds between looks.
        most_answers: kept for scoring, of all replicas.
        """
        self._store, self._live, self._promoter = store, live, promoter
        self._interval, self._most_answers = interval, most_answers
        self._owner = f"{store.replica}/{uuid.uuid4().hex[:12]}"
        self._lock = asyncio.Lock()
        self._written: dict[str, dict[str, Any]] = {}
        """What the store has of this replica's measurements."""
        self._failed: dict[str, str] = {}
        """Experiments that could not be decided on, and why: said once."""
        self._away = False
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.unreadable: dict[str, str] = {}

    async def load(self) -> None:
        """Route by what the store says; before the first request.

        Raises:
            StoreError: the database failed.
        """
        async with self._lock:
            await self._read()

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._run(), name="liveprune-experiments")

    async def stop(self) -> None:
        """Write what is left, and let others decide."""
        self._stopping.set()
        if self._task is not None:
            await self._task
        await self._promoter.stop()
        try:
            async with self._lock:
                await self._write()
            await asyncio.to_thread(self._store.experiments.release, self._owner)
        except StoreError as error:
            logger.warning("experiments: the last measurements are lost: %s", error)

    async def refresh(self) -> None:
        """Take up what was changed in the store, at once.

        Raises:
            StoreError: the database failed.
        """
        async with self._lock:
            # First, since what has ended is no longer measured afterwards.
            await self._write()
            await self._read()

    async def look(self) -> None:
        """Write, read, decide, and act.

        Raises:
            StoreError: the database failed; what was not done is done at the next look.
        """
        async with self._lock:
            await self._write()
            await self._read()
            acted = False
            for running in list(self._live.running):
                acted |= await self._decided(running)
            if acted:
                await self._read()
        await self._promoter.look()

    async def take_answer(self, response_id: str) -> Assignment:
        """Which arm gave an answer; asked again, it is no longer known.

        Raises:
            UnknownExperimentError: no running experiment gave it, it was scored, or it is too old.
            StoreError: the database failed.
        """
        async with self._lock:  # or it could be on its way from here to the store
            found = self._live.answer(response_id)
            if found is not None:
                self._live.forget_answers({response_id: found})
                return found
            return await asyncio.to_thread(self._store.measurements.take_answer, response_id)

    async def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                await self.look()
            except StoreError as error:
                if not self._away:
                    logger.warning("experiments go on as they are, and undecided: %s", error)
                self._away = True
            except LiveprunError as error:
                logger.warning("experiments: %s", error)
            except Exception:  # a defect in one look must not end all experiments
                logger.exception("experiments: unexpected")
            else:
                if self._away:
                    logger.info("experiments: the store is back")
                self._away = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._stopping.wait()

    async def _write(self) -> None:
        """Write what was measured since the last time."""
        changed = {}
        names = [running.experiment.name for running in self._live.running]
        for name in names:
            measured = self._live.measured(name)
            form = None if measured is None else measured.to_json()
            if form is not None and form != self._written.get(name):
                changed[name] = form
            await asyncio.sleep(0)  # each takes milliseconds, and this thread streams tokens
        answers = self._live.answers()
        write = self._store.measurements.write
        await asyncio.to_thread(write, changed, answers, most=self._most_answers)
        self._live.forget_answers(answers)
        self._written = {**self._written, **changed}

    async def _read(self) -> None:
        """Route by what the store says."""
        found = await asyncio.to_thread(self._running)
        known = {x.experiment.name for x in self._live.running}
        new = {row.name: row for row, _ in found if row.name not in known}
        unreadable = {row.name: x for row, x in found if isinstance(x, str)}
        measured = {}
        forms = await asyncio.to_thread(self._store.measurements.mine, list(new)) if new else {}
        for name, form in forms.items():
            try:
                measured[name] = merged(new[name], [form])
            except ExperimentError as error:
                unreadable[name] = f"what was measured before cannot be read: {error}"
        for name, why in unreadable.items():
            if self.unreadable.get(name) != why:
                logger.error("experiment %s: is not run here: %s", name, why)
        self.unreadable = unreadable
        running = [x for row, x in found if isinstance(x, Running) and row.name not in unreadable]
        self._live.install(running, measured)
        names = {x.experiment.name for x in running}
        self._written = {name: form for name, form in self._written.items() if name in names}
        self._failed = {name: why for name, why in self._failed.items() if name in names}

    def _running(self) -> list[tuple[StoredExperiment, Running | str]]:
        """Rows of experiments that run, each as it is routed by, or why it cannot be."""
        found: list[tuple[StoredExperiment, Running | str]] = []
        for row in self._store.experiments.look():
            try:
                found.append((row, read_running(row)))
            except ExperimentError as error:
                found.append((row, str(error)))
        return found

    async def _decided(self, running: Running) -> bool:
        """Decide on an experiment if that is up to this process; whether anything has changed."""
        name = running.experiment.name
        try:
            found = await asyncio.to_thread(self._decide, name)
        except ExperimentError as error:
            if self._failed.get(name) != str(error):
                logger.warning("experiment %s: cannot be decided on: %s", name, error)
            self._failed[name] = str(error)
            return False
        self._failed.pop(name, None)
        return found

    def _decide(self, name: str) -> bool:
        store = self._store
        claimed = store.experiments.claim(name, self._owner, LEASE_LOOKS * self._interval)
        if claimed is None:
            return False
        found, moment = claimed
        experiment = found.experiment
        record = record_of(
            experiment,
            merged(found, store.measurements.of(name).values()),
            now=moment,
            started=found.started or moment,
            phase_started=found.phase_started or moment,
            last_action=found.last_action,
            earlier_mismatch_p=found.mismatch_p,
        )
        decision = decide(record)
        outcome = outcome_of(experiment, found.shares[-1], decision)
        before = store.decisions.newest(name)
        said = before and (before.decision["verdict"], before.decision["arm"])
        news = outcome.acts or (decision.verdict, decision.arm) != said
        written = store.decisions.add(
            found,
            self._owner,
            decision.to_json(),
            record.to_json(),
            outcome,
            moment=moment,
            news=news,
            reason="; ".join(decision.reasons),
        )
        if written and news:
            _tell(name, decision, outcome)
        return written and outcome.acts


def _tell(name: str, decision: Decision, outcome: Outcome) -> None:
    """One line in the log, the same news only once."""
    what = ""
    if outcome.shares is not None:
        what = f", shares are now {dict(outcome.shares)} millionths"
    if outcome.state is not None:
        what += f", ended as {outcome.state}"
    level = logging.WARNING if decision.actions else logging.INFO
    arm = f" {decision.arm}" if decision.arm else ""
    reasons = "; ".join(decision.reasons)
    logger.log(level, "experiment %s: %s%s%s: %s", name, decision.verdict, arm, what, reasons)
