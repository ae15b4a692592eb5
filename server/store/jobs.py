"""The queue of background jobs: who works on which, for how long, and what came of it.

Whoever claims a job holds a lease on it and renews it while working. A worker that dies lets the
lease run out, and another one goes on. Every change checks the owner in the same transaction: a
worker that slept through its lease cannot write over the next one's work.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, RowMapping

from liveprune.pruning.errors import ConflictError, VariantError
from liveprune.server.store import schema
from liveprune.server.store.database import now, transaction

_TABLE = schema.jobs
SHORTEST_PREFIX = 4


class JobState(StrEnum):
    """Of a job; it ends in one of the last three."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class UnknownJobError(VariantError):
    """There is no job of that id, or there are several that begin so."""


class LeaseLostError(ConflictError):
    """Somebody else works on the job, or nobody should: the caller must stop."""


@dataclass(frozen=True)
class Job:
    """One row of the queue."""

    id: str
    """32 hex digits."""
    request: Mapping[str, Any]
    state: JobState
    created: float
    """Seconds since 1970, as all times here."""
    started: float | None
    """The first time that somebody claimed it."""
    finished: float | None
    owner: str | None
    """Who holds the lease."""
    lease_until: float | None
    attempt: int
    """Times that it was claimed after a worker died."""
    cancel_asked: bool
    progress: Mapping[str, Any]
    best: Mapping[str, Any] | None
    """The best candidate so far."""
    cost: Mapping[str, Any]
    error: str
    result: Mapping[str, Any] | None


class Jobs:
    """The jobs of one base model."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine, self._model = engine, model

    def add(self, request: Mapping[str, Any]) -> Job:
        """Queue a job."""
        with transaction(self._engine) as connection:
            values = {
                "id": uuid.uuid4().hex,
                "model": self._model,
                "request": dict(request),
                "state": JobState.QUEUED.value,
                "created": now(connection),
                "attempt": 0,
                "cancel_asked": False,
                "progress": {},
                "cost": {},
                "error": "",
            }
            connection.execute(_TABLE.insert().values(values))
            return self._job(connection, str(values["id"]))

    def get(self, id: str) -> Job:
        """One job, by its id or the beginning of it.

        Raises:
            UnknownJobError: there is none, or there are several.
        """
        with transaction(self._engine) as connection:
            return self._job(connection, id)

    def list(self, *, limit: int = 100) -> list[Job]:
        """The newest first."""
        newest = (_TABLE.c.created.desc(), _TABLE.c.id)
        query = self._mine(sa.select(_TABLE)).order_by(*newest).limit(limit)
        with transaction(self._engine) as connection:
            return [_job_of(row) for row in connection.execute(query).mappings()]

    def claim(self, owner: str, lease: float) -> Job | None:
        """Take the oldest job that waits, or whose worker's lease ran out; None if none does.

        Args:
            owner: who asks; unique among all workers.
            lease: seconds.
        """
        with transaction(self._engine) as connection:
            moment = now(connection)
            lost = (_TABLE.c.state == JobState.RUNNING.value) & (_TABLE.c.lease_until < moment)
            waits = (_TABLE.c.state == JobState.QUEUED.value) | lost
            oldest = (_TABLE.c.created, _TABLE.c.id)
            query = self._mine(sa.select(_TABLE)).where(waits).order_by(*oldest).limit(1)
            # Others that claim at the same moment take the next one. (SQLite: one at a time.)
            row = connection.execute(query.with_for_update(skip_locked=True)).mappings().first()
            if row is None:
                return None
            found = _job_of(row)
            self._change(
                connection,
                found.id,
                state=JobState.RUNNING.value,
                owner=owner,
                lease_until=moment + lease,
                started=moment if found.started is None else found.started,
                attempt=found.attempt + (found.state is JobState.RUNNING),
            )
            return self._job(connection, found.id)

    def beat(
        self,
        id: str,
        owner: str,
        lease: float,
        *,
        progress: Mapping[str, Any] | None = None,
        best: Mapping[str, Any] | None = None,
        cost: Mapping[str, Any] | None = None,
    ) -> Job:
        """Renew the lease, and note how far the work is; what is None stays.

        Raises:
            LeaseLostError: the job is no longer the owner's.
        """
        stated = {"progress": progress, "best": best, "cost": cost}
        with transaction(self._engine) as connection:
            self._own(connection, id, owner)
            self._change(
                connection,
                id,
                lease_until=now(connection) + lease,
                **{name: dict(value) for name, value in stated.items() if value is not None},
            )
            return self._job(connection, id)

    def finish(
        self,
        id: str,
        owner: str,
        state: JobState,
        *,
        error: str = "",
        result: Mapping[str, Any] | None = None,
    ) -> Job:
        """End a job as done, failed or cancelled.

        Raises:
            LeaseLostError: the job is no longer the owner's.
        """
        if not state.ended:
            raise ValueError(f"state is {state.value}, expected one that a job ends in")
        with transaction(self._engine) as connection:
            self._own(connection, id, owner)
            self._change(
                connection,
                id,
                state=state.value,
                error=error,
                result=None if result is None else dict(result),
                **self._ended(connection),
            )
            return self._job(connection, id)

    def give_back(self, id: str, owner: str) -> Job:
        """Put a job back into the queue: its worker stops and did not fail.

        Raises:
            LeaseLostError: the job is no longer the owner's.
        """
        with transaction(self._engine) as connection:
            self._own(connection, id, owner)
            queued = {"state": JobState.QUEUED.value, "owner": None, "lease_until": None}
            self._change(connection, id, **queued)
            return self._job(connection, id)

    def ask_cancel(self, id: str) -> Job:
        """End a job that waits; tell the worker of one that runs.

        Raises:
            UnknownJobError: there is no such job.
            ConflictError: it has ended.
        """
        with transaction(self._engine) as connection:
            found = self._job(connection, id, locked=True)
            if found.state.ended:
                raise ConflictError(f"job {found.id}: has ended: {found.state}")
            if found.state is JobState.QUEUED:
                ended = self._ended(connection)
                self._change(connection, found.id, state=JobState.CANCELLED.value, **ended)
            else:
                self._change(connection, found.id, cancel_asked=True)
            return self._job(connection, found.id)

    def resume(self, id: str) -> Job:
        """Queue a job again that failed or was cancelled; it goes on where it was.

        Raises:
            UnknownJobError: there is no such job.
            ConflictError: it waits, runs, or is done.
        """
        with transaction(self._engine) as connection:
            found = self._job(connection, id, locked=True)
            if found.state not in (JobState.FAILED, JobState.CANCELLED):
                raise ConflictError(
                    f"job {found.id}: is {found.state}, expected one that failed or was cancelled"
                )
            self._change(
                connection,
                found.id,
                state=JobState.QUEUED.value,
                finished=None,
                error="",
                cancel_asked=False,
            )
            return self._job(connection, found.id)

    def _own(self, connection: Connection, id: str, owner: str) -> None:
        found = self._job(connection, id, locked=True)
        if found.state is not JobState.RUNNING or found.owner != owner:
            raise LeaseLostError(
                f"job {found.id}: is {found.state}, owned by {found.owner or 'nobody'}; expected "
                f"it running and owned by {owner}"
            )

    def _ended(self, connection: Connection) -> dict[str, Any]:
        return {"finished": now(connection), "owner": None, "lease_until": None}

    def _job(
        self,
        connection: Connection,
        id: str,
        *,
        locked: bool = False,
    ) -> Job:
        named = _TABLE.c.id == id
        if SHORTEST_PREFIX <= len(id) < 32:
            named = _TABLE.c.id.startswith(id, autoescape=True)
        query = self._mine(sa.select(_TABLE)).where(named).limit(2)
        rows = connection.execute(query.with_for_update() if locked else query).mappings().all()
        if len(rows) != 1:
            found = "several that begin so" if rows else "no such job"
            raise UnknownJobError(
                f"job {id!r}: found {found}, expected one of those that are listed"
            )
        return _job_of(rows[0])

    def _mine(self, query: sa.Select[Any]) -> sa.Select[Any]:
        return query.where(_TABLE.c.model == self._model)

    def _change(self, connection: Connection, id: str, **values: Any) -> None:
        connection.execute(_TABLE.update().where(_TABLE.c.id == id).values(values))


def _job_of(row: RowMapping) -> Job:
    values = {name: row[name] for name in Job.__dataclass_fields__}
    return Job(**{**values, "state": JobState(row["state"])})
