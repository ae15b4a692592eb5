"""What was decided in experiments, and which replicas swap to a winner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from liveprune.server.experiments.actions import Outcome
from liveprune.server.store import schema
from liveprune.server.store.database import now, transaction
from liveprune.server.store.experiment_rows import (
    Clock,
    StoredExperiment,
    UnknownExperimentError,
)
from liveprune.server.store.experiments import Experiments

_TABLE, _PROMOTIONS = schema.decisions, schema.promotions
THINNED_SECONDS = 60.0
"""Of decisions that say nothing new, one in so many seconds stays,"""
MOST_THINNED = 1000
"""and so many of an experiment."""

Json = dict[str, Any]


@dataclass(frozen=True)
class StoredDecision:
    """One row."""

    id: int
    time: float
    """Seconds since 1970."""
    decision: Json
    """As ``Decision.to_json`` gives it."""
    record: Json
    """As ``Record.to_json`` gives it."""


@dataclass(frozen=True)
class Promotion:
    """What a replica swaps to because an experiment shipped it."""

    experiment: str
    replica: str
    variant: str
    """Tag."""
    asked: float
    """Seconds since 1970."""
    error: str
    """Why the last attempt failed; empty before one did."""


class Decisions:
    """The decisions of one base model's experiments."""

    def __init__(
        self,
        engine: Engine,
        model: str,
        replica: str,
        experiments: Experiments,
        clock: Clock = now,
    ) -> None:
        self._engine, self._model, self._clock = engine, model, clock
        self._replica = replica
        self._experiments = experiments

    def add(
        self,
        found: StoredExperiment,
        owner: str,
        decision: Json,
        record: Json,
        outcome: Outcome,
        *,
        moment: float,
        news: bool,
        reason: str,
    ) -> bool:
        """Record a decision and carry its outcome out, both or neither.

        Args:
            found: the row that was decided on.
            owner: of the lease.
            decision: in JSON form.
            record: that it follows from.
            outcome: what changes.
            moment: of the decision.
            news: it says something new, or does something: it is kept for good.
            reason: why the experiment ends, if it does.

        Returns:
            False, with nothing written, if the lease is lost or the experiment was changed.
        """
        with transaction(self._engine) as connection:
            p = float(decision["mismatch_p"])
            if not self._experiments.carry_out(
                connection, found, owner, outcome, moment=moment, mismatch_p=p, reason=reason
            ):
                return False
            values = {"time": moment, "record": record, "decision": decision, "kept": news}
            insert = _TABLE.insert().values(model=self._model, experiment=found.name, **values)
            number = connection.execute(insert.returning(_TABLE.c.id)).scalar_one()
            if not news:
                # After it: SQLite gives the number of a last row that is gone away again.
                self._thin_out(connection, found.name, number, moment)
            if outcome.promote is not None:
                self._promote(connection, found.name, outcome.promote, moment)
            return True

    def newest(self, name: str) -> StoredDecision | None:
        """The last decision of an experiment; None before the first."""
        found = self.of(name, limit=1)
        return found[-1] if found else None

    def newest_ids(self) -> dict[str, int]:
        """Experiment to the number of its last decision."""
        query = (
            sa.select(_TABLE.c.experiment, sa.func.max(_TABLE.c.id).label("id"))
            .where(_TABLE.c.model == self._model)
            .group_by(_TABLE.c.experiment)
        )
        with transaction(self._engine) as connection:
            return {row.experiment: row.id for row in connection.execute(query)}

    def of(self, name: str, *, limit: int = 2000) -> list[StoredDecision]:
        """The newest ones, the oldest of them first."""
        query = self._query(name).order_by(_TABLE.c.id.desc()).limit(limit)
        with transaction(self._engine) as connection:
            rows = connection.execute(query).all()
        return [StoredDecision(x.id, x.time, x.decision, x.record) for x in reversed(rows)]

    def get(self, name: str, number: int) -> StoredDecision:
        """One decision.

        Raises:
            UnknownExperimentError: it was thinned out, or never was.
        """
        with transaction(self._engine) as connection:
            x = connection.execute(self._query(name).where(_TABLE.c.id == number)).first()
        if x is None:
            raise UnknownExperimentError(
                f"experiment {name}: found no decision {number}, expected one that is listed"
            )
        return StoredDecision(x.id, x.time, x.decision, x.record)

    def promotions(self) -> list[Promotion]:
        """Swaps that are still to be made, the oldest first."""
        columns = [_PROMOTIONS.c[name] for name in Promotion.__dataclass_fields__]
        query = sa.select(*columns).where(
            _PROMOTIONS.c.model == self._model, _PROMOTIONS.c.done.is_(None)
        )
        order = (_PROMOTIONS.c.asked, _PROMOTIONS.c.experiment, _PROMOTIONS.c.replica)
        with transaction(self._engine) as connection:
            return [Promotion(*row) for row in connection.execute(query.order_by(*order))]

    def settle(self, promotion: Promotion, error: str = "") -> None:
        """Note that a replica has made its swap, or why it could not."""
        mine = [_PROMOTIONS.c.model == self._model]
        mine += [_PROMOTIONS.c[x] == getattr(promotion, x) for x in ("experiment", "replica")]
        with transaction(self._engine) as connection:
            done = None if error else self._clock(connection)
            values = {"done": done, "error": error}
            connection.execute(_PROMOTIONS.update().where(*mine).values(values))

    def _promote(
        self, connection: Connection, experiment: str, variant: str, moment: float
    ) -> None:
        """Have every replica that there is swap: those that come later begin as they are told."""
        replicas = {self._replica}
        for table in (schema.servers, schema.measurements):
            query = sa.select(table.c.replica).where(table.c.model == self._model)
            replicas |= set(connection.execute(query).scalars())
        for replica in sorted(replicas):
            connection.execute(
                _PROMOTIONS.insert().values(
                    model=self._model,
                    experiment=experiment,
                    replica=replica,
                    variant=variant,
                    asked=moment,
                    error="",
                )
            )

    def _thin_out(self, connection: Connection, name: str, newest: int, moment: float) -> None:
        """Of those that say nothing new, leave the last of each minute, and not too many."""
        mine = (
            _TABLE.c.model == self._model,
            _TABLE.c.experiment == name,
            _TABLE.c.kept.is_(False),
        )
        since = moment // THINNED_SECONDS * THINNED_SECONDS
        same_minute = (_TABLE.c.time >= since, _TABLE.c.id < newest)
        connection.execute(_TABLE.delete().where(*mine, *same_minute))
        order = sa.select(_TABLE.c.id).where(*mine).order_by(_TABLE.c.id.desc())
        beyond = connection.scalar(order.offset(MOST_THINNED).limit(1))
        if beyond is not None:
            connection.execute(_TABLE.delete().where(*mine, _TABLE.c.id <= beyond))

    def _query(self, name: str) -> sa.Select[Any]:
        return sa.select(_TABLE).where(_TABLE.c.model == self._model, _TABLE.c.experiment == name)
