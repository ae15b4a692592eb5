"""Variants that all replicas of a model know: a tag, the plan it names, and where that is from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from liveprune.pruning.errors import ConflictError
from liveprune.server.store import schema
from liveprune.server.store.database import exclusive, now, transaction

_TABLE = schema.variants


@dataclass(frozen=True)
class StoredVariant:
    """One row."""

    tag: str
    digest: str
    """Of its plan."""
    lineage: Mapping[str, Any]
    """How the plan came about: method, parameters, seed, data, versions, scores."""
    job: str | None
    """The job that found it."""
    created: float
    """Seconds since 1970."""


class Variants:
    """The variants of one base model."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine, self._model = engine, model

    def all(self) -> dict[str, StoredVariant]:
        """By tag."""
        with transaction(self._engine) as connection:
            return self.read(connection)

    def publish(
        self, tag: str, digest: str, size: int, lineage: Mapping[str, Any], *, job: str | None
    ) -> None:
        """Make a variant known whose plan's files are complete.

        The same again does nothing, so that a job may repeat its last step.

        Raises:
            ConflictError: the tag names another plan.
        """
        with transaction(self._engine) as connection:
            exclusive(connection, self._model)
            found = self.read(connection).get(tag)
            if found is not None and found.digest != digest:
                raise ConflictError(
                    f"variant {tag!r}: names the plan {found.digest}, expected a new tag"
                )
            if found is None:
                self.note_plan(connection, digest, size)
                self.write(connection, tag, digest, lineage, job)

    def read(self, connection: Connection) -> dict[str, StoredVariant]:
        """By tag, within a transaction."""
        query = sa.select(_TABLE).where(_TABLE.c.model == self._model).order_by(_TABLE.c.tag)
        names = StoredVariant.__dataclass_fields__
        rows = connection.execute(query).mappings()
        return {row["tag"]: StoredVariant(**{name: row[name] for name in names}) for row in rows}

    def write(
        self,
        connection: Connection,
        tag: str,
        digest: str,
        lineage: Mapping[str, Any],
        job: str | None = None,
    ) -> None:
        """Set what a tag names, within a transaction."""
        self.erase(connection, tag)
        connection.execute(
            _TABLE.insert().values(
                model=self._model,
                tag=tag,
                digest=digest,
                lineage=dict(lineage),
                job=job,
                created=now(connection),
            )
        )

    def erase(self, connection: Connection, tag: str) -> None:
        """Forget a tag, within a transaction."""
        connection.execute(
            _TABLE.delete().where(_TABLE.c.model == self._model, _TABLE.c.tag == tag)
        )

    def note_plan(self, connection: Connection, digest: str, size: int) -> None:
        """Record that a plan's files are complete, within a transaction."""
        table = schema.plans
        mine = (table.c.model == self._model, table.c.digest == digest)
        if connection.execute(sa.select(table.c.digest).where(*mine)).first() is None:
            connection.execute(
                table.insert().values(
                    model=self._model, digest=digest, bytes=size, created=now(connection)
                )
            )

    def drop_plan(self, digest: str) -> bool:
        """No longer count on a plan's files; False if a variant still has it."""
        table = schema.plans
        with transaction(self._engine) as connection:
            exclusive(connection, self._model)
            if any(variant.digest == digest for variant in self.read(connection).values()):
                return False
            mine = (table.c.model == self._model, table.c.digest == digest)
            connection.execute(table.delete().where(*mine))
            return True

    def plans(self) -> dict[str, int]:
        """Bytes of the plans' files by digest."""
        table = schema.plans
        query = sa.select(table.c.digest, table.c.bytes).where(table.c.model == self._model)
        with transaction(self._engine) as connection:
            return {row.digest: row.bytes for row in connection.execute(query)}
