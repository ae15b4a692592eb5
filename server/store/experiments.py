"""Experiments: what they are, how far they are, and who may decide.

A change of a row adds one to its ``version``. Whoever decides holds a lease on the experiment, and
writes only if neither lease nor version has moved since it read the row: a replica that slept, or
an operator's change in between, cannot be written over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from liveprune.pruning.errors import ConflictError
from liveprune.server.experiments.actions import Outcome
from liveprune.server.experiments.definition import Experiment, check_exclusive
from liveprune.server.store import schema
from liveprune.server.store.database import exclusive, now, transaction
from liveprune.server.store.experiment_rows import (
    ACTIVE,
    Clock,
    ExperimentState,
    StoredExperiment,
    UnknownExperimentError,
    experiment_of,
    phase_of,
)

_TABLE = schema.experiments
MOST_ACTIVE = 8
"""Running and scheduled at once."""
MOST_PHASES = 50
"""Of one experiment: each has measurements of its own."""


class Experiments:
    """The experiments on one base model."""

    def __init__(self, engine: Engine, model: str, clock: Clock = now) -> None:
        self._engine, self._model, self._clock = engine, model, clock

    def add(self, experiment: Experiment, *, key: str | None = None) -> StoredExperiment:
        """Start an experiment, or schedule it if its start is in the future.

        The same ``key`` with the same experiment gives the one that it made.

        Raises:
            ConflictError: the name was used before, too many run, the key came with another one, or
                its end has passed.
            ExperimentError: it would own units of another one.
        """
        with transaction(self._engine) as connection:
            exclusive(connection, self._model)
            moment = self._clock(connection)
            if key is not None and (earlier := self._by_key(connection, key)) is not None:
                if earlier.definition != experiment.to_json():
                    raise ConflictError(
                        f"idempotency key {key!r}: came with another request, which began "
                        f"experiment {earlier.name}"
                    )
                return earlier
            self._check(connection, experiment, moment)
            waits = experiment.start is not None and experiment.start > moment
            state = ExperimentState.SCHEDULED if waits else ExperimentState.RUNNING
            connection.execute(
                _TABLE.insert().values(
                    model=self._model,
                    name=experiment.name,
                    definition=experiment.to_json(),
                    state=state.value,
                    created=moment,
                    started=None if waits else moment,
                    reason="",
                    history=[phase_of(experiment.shares, moment)],
                    mismatch_p=1.0,
                    version=1,
                    request_key=key,
                )
            )
            return self.read(connection, experiment.name)

    def check(self, experiment: Experiment) -> None:
        """Raise what ``add`` would, without the key's errors."""
        with transaction(self._engine) as connection:
            self._check(connection, experiment, self._clock(connection))

    def get(self, name: str) -> StoredExperiment:
        """One experiment; UnknownExperimentError if there is none."""
        with transaction(self._engine) as connection:
            return self.read(connection, name)

    def by_key(self, key: str) -> StoredExperiment | None:
        """The experiment that a request with this idempotency key made."""
        with transaction(self._engine) as connection:
            return self._by_key(connection, key)

    def newest(self, *, limit: int = 100) -> list[StoredExperiment]:
        """The newest first."""
        newest = (_TABLE.c.created.desc(), _TABLE.c.name)
        query = self._mine().order_by(*newest).limit(limit)
        with transaction(self._engine) as connection:
            return [experiment_of(row) for row in connection.execute(query).mappings()]

    def look(self) -> list[StoredExperiment]:
        """Begin what is scheduled, end what has an end, by the clock; then all that run.

        In the order of their start.
        """
        with transaction(self._engine) as connection:
            moment = self._clock(connection)
            for found in self._active(connection):
                self._turn(connection, found, moment)
            running = [x for x in self._active(connection) if x.state is ExperimentState.RUNNING]
            return sorted(running, key=lambda x: (x.started or 0.0, x.name))

    def move(self, name: str, shares: Mapping[str, int]) -> StoredExperiment:
        """Begin a phase with new shares; the present ones change nothing.

        Raises:
            UnknownExperimentError: there is no such experiment.
            ConflictError: it does not run, or has had too many phases.
        """
        with transaction(self._engine) as connection:
            found = self.read(connection, name, locked=True)
            if found.state is not ExperimentState.RUNNING:
                raise ConflictError(f"experiment {name}: is {found.state}, expected a running one")
            if found.shares[-1] != dict(shares):
                if len(found.history) >= MOST_PHASES:
                    raise ConflictError(
                        f"experiment {name}: has had {len(found.history)} phases, expected fewer "
                        f"than {MOST_PHASES}; stop it and start another"
                    )
                phase = phase_of(shares, self._clock(connection))
                self.change(connection, found, history=[*found.history, phase])
            return self.read(connection, name)

    def stop(self, name: str, reason: str) -> StoredExperiment:
        """End an experiment that runs or is scheduled.

        Raises:
            UnknownExperimentError: there is no such experiment.
            ConflictError: it has ended.
        """
        with transaction(self._engine) as connection:
            found = self.read(connection, name, locked=True)
            if found.state not in ACTIVE:
                raise ConflictError(f"experiment {name}: has ended: {found.state}")
            self.end(connection, found, ExperimentState.STOPPED, reason)
            return self.read(connection, name)

    def claim(self, name: str, owner: str, lease: float) -> tuple[StoredExperiment, float] | None:
        """Take or renew the lease on a running experiment; None if another holds it.

        Args:
            name: of the experiment.
            owner: unique among all processes.
            lease: seconds.

        Returns:
            The row, and the time.
        """
        with transaction(self._engine) as connection:
            moment = self._clock(connection)
            free = sa.or_(
                _TABLE.c.owner.is_(None), _TABLE.c.owner == owner, _TABLE.c.lease_until < moment
            )
            running = _TABLE.c.state == ExperimentState.RUNNING.value
            taken = connection.execute(
                _TABLE.update()
                .where(*self._named(name), running, free)
                .values(owner=owner, lease_until=moment + lease)
            )
            return (self.read(connection, name), moment) if taken.rowcount else None

    def release(self, owner: str) -> None:
        """Give all leases back."""
        mine = (_TABLE.c.model == self._model, _TABLE.c.owner == owner)
        with transaction(self._engine) as connection:
            connection.execute(_TABLE.update().where(*mine).values(owner=None, lease_until=None))

    def carry_out(
        self,
        connection: Connection,
        found: StoredExperiment,
        owner: str,
        outcome: Outcome,
        *,
        moment: float,
        mismatch_p: float,
        reason: str,
    ) -> bool:
        """Write what a decision changes, within a transaction; False if it comes too late.

        Args:
            connection: of the transaction.
            found: the row that was decided on.
            owner: of the lease.
            outcome: what changes.
            moment: of the decision.
            mismatch_p: the smallest so far.
            reason: why it ends, if it does.
        """
        row = connection.execute(
            self._mine(_TABLE.c.version, _TABLE.c.owner)
            .where(_TABLE.c.name == found.name)
            .with_for_update()
        ).one()
        if (row.version, row.owner) != (found.version, owner):
            return False
        values: dict[str, Any] = {}
        if mismatch_p != found.mismatch_p:
            values["mismatch_p"] = mismatch_p
        if outcome.acts:
            values["last_action"] = moment
        if outcome.shares is not None:
            values["history"] = [*found.history, phase_of(outcome.shares, moment)]
        if values:
            self.change(connection, found, **values)
        if outcome.state is not None:
            self.end(connection, found, ExperimentState(outcome.state), reason)
        return True

    def end(
        self, connection: Connection, found: StoredExperiment, state: ExperimentState, reason: str
    ) -> None:
        """End one, within a transaction."""
        ended = self._clock(connection)
        self.change(connection, found, state=state.value, ended=ended, reason=reason, owner=None)

    def change(self, connection: Connection, found: StoredExperiment, **values: Any) -> None:
        """Write columns, within a transaction."""
        version = _TABLE.c.version + 1
        query = _TABLE.update().where(*self._named(found.name))
        connection.execute(query.values(version=version, **values))

    def read(self, connection: Connection, name: str, *, locked: bool = False) -> StoredExperiment:
        """One row, within a transaction.

        Raises:
            UnknownExperimentError: there is none.
        """
        query = self._mine().where(_TABLE.c.name == name)
        row = connection.execute(query.with_for_update() if locked else query).mappings().first()
        if row is None:
            raise UnknownExperimentError(
                f"experiment {name!r}: found none of this name, expected one that is listed"
            )
        return experiment_of(row)

    def _turn(self, connection: Connection, found: StoredExperiment, moment: float) -> None:
        """Begin or end one whose time has come; of several replicas the first one does."""
        start, end = found.definition.get("start"), found.definition.get("end")
        values: dict[str, Any] = {}
        if end is not None and end <= moment:
            values = {
                "state": ExperimentState.STOPPED.value,
                "ended": moment,
                "reason": "its time was over",
                "owner": None,
            }
        elif found.state is ExperimentState.SCHEDULED and (start is None or start <= moment):
            values = {
                "state": ExperimentState.RUNNING.value,
                "started": moment,
                "history": [phase_of(found.shares[0], moment)],
            }
        if values:
            as_read = (_TABLE.c.version == found.version, _TABLE.c.state == found.state.value)
            query = _TABLE.update().where(*self._named(found.name), *as_read)
            connection.execute(query.values(version=found.version + 1, **values))

    def _check(self, connection: Connection, experiment: Experiment, moment: float) -> None:
        query = self._mine().where(_TABLE.c.name == experiment.name)
        if connection.execute(query).first() is not None:
            raise ConflictError(
                f"experiment {experiment.name}: the name was used before, expected a new one (who "
                "gets which arm follows from it)"
            )
        if experiment.end is not None and experiment.end <= moment:
            raise ConflictError(
                f"experiment {experiment.name}: its end, {experiment.end:.0f}, has passed"
            )
        active = self._active(connection)
        if len(active) >= MOST_ACTIVE:
            names = ", ".join(sorted(x.name for x in active))
            raise ConflictError(
                f"experiment {experiment.name}: found {len(active)} others that run or are "
                f"scheduled ({names}), expected fewer than {MOST_ACTIVE}; stop one"
            )
        for other in active:
            check_exclusive([other.experiment, experiment])

    def _active(self, connection: Connection) -> Collection[StoredExperiment]:
        query = self._mine().where(_TABLE.c.state.in_([x.value for x in ACTIVE]))
        rows = connection.execute(query.order_by(_TABLE.c.created, _TABLE.c.name)).mappings()
        return [experiment_of(row) for row in rows]

    def _by_key(self, connection: Connection, key: str) -> StoredExperiment | None:
        query = self._mine().where(_TABLE.c.request_key == key)
        row = connection.execute(query).mappings().first()
        return None if row is None else experiment_of(row)

    def _mine(self, *columns: sa.Column[Any]) -> sa.Select[Any]:
        return sa.select(*(columns or _TABLE.c)).where(_TABLE.c.model == self._model)

    def _named(self, name: str) -> tuple[sa.ColumnElement[bool], ...]:
        return (_TABLE.c.model == self._model, _TABLE.c.name == name)
