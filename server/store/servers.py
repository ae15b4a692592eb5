"""What each replica serves, written so that a restart comes back to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from liveprune.pruning.errors import ConflictError
from liveprune.server.store import schema
from liveprune.server.store.database import exclusive, now, transaction
from liveprune.server.store.variants import Variants

_TABLE = schema.servers


class Servers:
    """The saved states of one model's replicas."""

    def __init__(self, engine: Engine, model: str, replica: str, variants: Variants) -> None:
        self._engine, self._model, self.replica = engine, model, replica
        self._variants = variants

    def read(self) -> Mapping[str, Any] | None:
        """This replica's state; None before the first ``save``."""
        with transaction(self._engine) as connection:
            return self._states(connection).get(self.replica)

    def of_other_models(self) -> list[Mapping[str, Any]]:
        """States of replicas of other models in this database."""
        query = sa.select(_TABLE.c.state).where(_TABLE.c.model != self._model)
        with transaction(self._engine) as connection:
            return [row.state for row in connection.execute(query)]

    def all(self) -> Mapping[str, Mapping[str, Any]]:
        """By replica."""
        with transaction(self._engine) as connection:
            return self._states(connection)

    def save(
        self,
        state: Mapping[str, Any],
        *,
        variants: Mapping[str, str],
        before: Mapping[str, str],
        sizes: Mapping[str, int],
    ) -> None:
        """Write this replica's state, and what it changed of the variants, in one transaction.

        Args:
            state: plain JSON, with ``live``, the tags that answer requests.
            variants: tag to digest, as this replica knows them now.
            before: the same, as it knew them at the last ``save``; what others changed stays.
            sizes: bytes of the files of plans that are new, by digest.

        Raises:
            ConflictError: a variant is to be forgotten that another replica serves.
        """
        with transaction(self._engine) as connection:
            exclusive(connection, self._model)
            states = self._states(connection)
            for tag in before.keys() - variants.keys():
                holders = [
                    name
                    for name, other in states.items()
                    if name != self.replica and tag in other["live"]
                ]
                if holders:
                    raise ConflictError(
                        f"variant {tag!r}: is live on {', '.join(sorted(holders))}; remove it "
                        "there first"
                    )
                self._variants.erase(connection, tag)
            known = self._variants.read(connection)
            for tag, digest in variants.items():
                if before.get(tag) != digest and (tag not in known or known[tag].digest != digest):
                    self._variants.note_plan(connection, digest, sizes.get(digest, 0))
                    self._variants.write(connection, tag, digest, {})
            values = {"state": dict(state), "updated": now(connection)}
            mine = (_TABLE.c.model == self._model, _TABLE.c.replica == self.replica)
            if self.replica in states:
                connection.execute(_TABLE.update().where(*mine).values(values))
            else:
                connection.execute(
                    _TABLE.insert().values(model=self._model, replica=self.replica, **values)
                )

    def _states(self, connection: Connection) -> dict[str, Mapping[str, Any]]:
        query = sa.select(_TABLE.c.replica, _TABLE.c.state).where(_TABLE.c.model == self._model)
        return {row.replica: row.state for row in connection.execute(query)}
