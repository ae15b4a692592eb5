"""What is only ever added to: evaluations, ended swaps, the audit log; and the switches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from liveprune.server.store import schema
from liveprune.server.store.database import exclusive, now, transaction

Json = dict[str, Any]


class _Log:
    """Rows of one table for one model, newest first."""

    table: sa.Table
    time: str

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine, self._model = engine, model

    def list(self, *, limit: int = 100, **wanted: Any) -> list[Json]:
        """The newest rows first; ``wanted``: columns that must have these values."""
        columns = self.table.c
        query = sa.select(self.table).where(
            columns.model == self._model, *(columns[name] == x for name, x in wanted.items())
        )
        newest = (columns[self.time].desc(), columns.id.desc())
        with transaction(self._engine) as connection:
            rows = connection.execute(query.order_by(*newest).limit(limit)).mappings()
            return [{key: x for key, x in row.items() if key != "model"} for row in rows]

    def _insert(self, **values: Any) -> None:
        with transaction(self._engine) as connection:
            values.setdefault(self.time, now(connection))
            connection.execute(self.table.insert().values(model=self._model, **values))


class Evaluations(_Log):
    """What plans scored."""

    table, time = schema.evaluations, "created"

    def add(
        self, name: str, digest: str | None, scores: Mapping[str, Any], *, job: str | None = None
    ) -> None:
        """Record the scores of a plan (None: the full model) on the rows that ``name`` names."""
        self._insert(name=name, digest=digest, scores=dict(scores), job=job)


class Swaps(_Log):
    """Operations on variants that have ended."""

    table, time = schema.swaps, "created"

    def add(self, operation: Mapping[str, Any], replica: str) -> None:
        """Record one, as ``Operation.to_json`` gives it."""
        self._insert(
            id=operation["id"],
            replica=replica,
            kind=operation["kind"],
            variant=operation["variant"],
            state=operation["state"],
            error=operation["error"] or "",
            details={"seconds": operation["seconds"], "notes": operation["notes"]},
            created=operation["created"],
            finished=operation["finished"],
        )


class AuditRows(_Log):
    """Who asked for which change, and what became of it."""

    table, time = schema.audit, "time"

    def add(self, change: str, event: str, content: Mapping[str, Any], replica: str) -> None:
        """Record ``asked`` or ``answered`` of a change."""
        self._insert(change=change, event=event, content=dict(content), replica=replica)


class Settings:
    """Switches that all replicas of a model heed."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine, self._model = engine, model

    def get(self, key: str, default: Any = None) -> Any:
        """A setting's value."""
        table = schema.settings
        mine = (table.c.model == self._model, table.c.key == key)
        with transaction(self._engine) as connection:
            row = connection.execute(sa.select(table.c.value).where(*mine)).first()
        return default if row is None else row.value

    def set(self, key: str, value: Any) -> None:
        """Change a setting."""
        table = schema.settings
        mine = (table.c.model == self._model, table.c.key == key)
        with transaction(self._engine) as connection:
            exclusive(connection, self._model)
            values = {"value": value, "updated": now(connection)}
            if not connection.execute(table.update().where(*mine).values(values)).rowcount:
                connection.execute(table.insert().values(model=self._model, key=key, **values))
