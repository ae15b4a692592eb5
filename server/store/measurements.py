"""What replicas have measured of experiments, and which arm gave which answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from liveprune.server.experiments.live import Assignment
from liveprune.server.store import schema
from liveprune.server.store.database import now, transaction, upsert
from liveprune.server.store.experiment_rows import Clock, UnknownExperimentError

_ROWS, _ANSWERS = schema.measurements, schema.answers
ANSWER_SECONDS = 86_400.0
"""After which an answer can no longer be scored."""
MOST_ANSWERS = 200_000
LONGEST_ID = 255

Json = dict[str, Any]


class MeasurementRows:
    """The measurements of one base model's experiments."""

    def __init__(self, engine: Engine, model: str, replica: str, clock: Clock = now) -> None:
        self._engine, self._model, self._clock = engine, model, clock
        self._replica = replica

    def write(
        self, measured: Mapping[str, Json], answers: Mapping[str, Assignment], *, most: int
    ) -> None:
        """Write all that this replica has measured of some experiments, and add answers.

        Args:
            measured: experiment to ``Measurements.to_json``; it replaces what was there.
            answers: by response id.
            most: answers kept, of all replicas.
        """
        if not measured and not answers:
            return
        with transaction(self._engine) as connection:
            moment = self._clock(connection)
            rows = [
                {
                    "model": self._model,
                    "experiment": name,
                    "replica": self._replica,
                    "content": content,
                    "updated": moment,
                }
                for name, content in sorted(measured.items())
            ]
            upsert(connection, _ROWS, rows)
            if answers:
                self._add(connection, answers, moment)
                self._drop_old(connection, moment, most)

    def mine(self, names: Collection[str]) -> dict[str, Json]:
        """What this replica had measured of these experiments, where it had."""
        query = self._of(_ROWS.c.experiment, _ROWS.c.content).where(
            _ROWS.c.experiment.in_(names), _ROWS.c.replica == self._replica
        )
        with transaction(self._engine) as connection:
            return {row.experiment: row.content for row in connection.execute(query)}

    def of(self, name: str) -> dict[str, Json]:
        """What each replica has measured of one experiment."""
        query = self._of(_ROWS.c.replica, _ROWS.c.content).where(_ROWS.c.experiment == name)
        with transaction(self._engine) as connection:
            rows = connection.execute(query.order_by(_ROWS.c.replica))
            return {row.replica: row.content for row in rows}

    def updated(self) -> dict[str, tuple[tuple[str, float], ...]]:
        """Experiment to its replicas, each with the time of its last write."""
        columns = (_ROWS.c.experiment, _ROWS.c.replica, _ROWS.c.updated)
        found: dict[str, tuple[tuple[str, float], ...]] = {}
        with transaction(self._engine) as connection:
            for row in connection.execute(self._of(*columns).order_by(*columns)):
                before = found.get(row.experiment, ())
                found[row.experiment] = (*before, (row.replica, row.updated))
        return found

    def take_answer(self, response_id: str) -> Assignment:
        """Which arm gave an answer; asked again, it is no longer known.

        Raises:
            UnknownExperimentError: no running experiment gave it, it was scored, or it is too old.
        """
        named = (_ANSWERS.c.model == self._model, _ANSWERS.c.response_id == response_id)
        with transaction(self._engine) as connection:
            row = connection.execute(sa.select(_ANSWERS).where(*named).with_for_update()).first()
            fresh = row is not None and row.created > self._clock(connection) - ANSWER_SECONDS
            if row is None or not fresh:
                raise UnknownExperimentError(
                    f"answer {response_id!r}: found none, expected an answer that an arm of a "
                    "running experiment gave within a day, and that was not scored yet"
                )
            connection.execute(_ANSWERS.delete().where(*named))
            return Assignment(
                row.experiment,
                row.arm,
                variant="",
                shadow=None,
                phase=row.phase,
                unit=int(row.unit, 16),
                counted=True,
                fidelity=0.0,
            )

    def _add(
        self, connection: Connection, answers: Mapping[str, Assignment], moment: float
    ) -> None:
        rows = [
            {
                "model": self._model,
                "response_id": response_id,
                "experiment": x.experiment,
                "arm": x.arm,
                "phase": x.phase,
                "unit": f"{x.unit:016x}",
                "created": moment,
            }
            for response_id, x in sorted(answers.items())
            # A client may have chosen it: what no column takes cannot be asked for either.
            if len(response_id) <= LONGEST_ID and "\0" not in response_id
        ]
        upsert(connection, _ANSWERS, rows)

    def _drop_old(self, connection: Connection, moment: float, most: int) -> None:
        mine = _ANSWERS.c.model == self._model
        newest = sa.select(_ANSWERS.c.created).where(mine).order_by(_ANSWERS.c.created.desc())
        beyond = connection.scalar(newest.offset(most).limit(1))
        oldest = max(moment - ANSWER_SECONDS, -1.0 if beyond is None else beyond)
        connection.execute(_ANSWERS.delete().where(mine, _ANSWERS.c.created <= oldest))

    def _of(self, *columns: sa.Column[Any]) -> sa.Select[Any]:
        return sa.select(*columns).where(_ROWS.c.model == self._model)
