"""Fitness of plans: asked of the engine once, kept in the journal, whatever fails.

A plan that the engine cannot run or that gives no finite numbers is a failed candidate, never the
end of the search; an engine that fails on the full model, too, is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from liveprune.pruning.errors import EngineError, LiveprunError
from liveprune.pruning.evaluation.engine import Engine
from liveprune.pruning.plan import Plan
from liveprune.pruning.search.candidate import Values
from liveprune.pruning.search.journal import Entry, Journal
from liveprune.pruning.search.row_sets import RowSet

FULL = "full"
"""Stands for the digest of no plan: the full model."""


class SearchCancelledError(LiveprunError):
    """The search was told to stop; its folder holds all it did so far."""


@dataclass(frozen=True)
class Failure:
    """Why a plan has no values."""

    message: str


@dataclass
class Cost:
    """What a search took, the parts before a resume included."""

    calls: int = 0
    rows: int = 0
    """Rows scored, of all plans together."""
    wall_seconds: float = 0.0
    """Inside calls of the engine."""
    cpu_seconds: float = 0.0
    """The same, of all threads of this process."""


class Evaluator:
    """Scores plans on rows, each at most once."""

    def __init__(
        self, engine: Engine, journal: Journal, cancel: threading.Event | None = None
    ) -> None:
        self.cost = Cost()
        self._engine = engine
        self._journal = journal
        self._cancel = cancel
        self._known: dict[tuple[str, str], Values | Failure] = {}
        """By set of rows and digest: values of the rows scored so far, from the first on."""

    @property
    def replaying(self) -> bool:
        return self._journal.replaying

    def score(
        self, rows: RowSet, plans: Sequence[Plan | None], stop: int | None = None
    ) -> list[Values | Failure]:
        """Fitness of each plan on the first ``stop`` rows, in [0, 1]; None takes all rows.

        Rows that a plan has been scored on are not asked for again; all others are one call, where
        the plans have come equally far.

        Raises:
            EngineError: the engine fails on the full model, too.
            SearchCancelledError: before a call.
            DataError: the journal is another search's.
        """
        stop = len(rows.rows) if stop is None else stop
        keys = [(rows.name, FULL if plan is None else plan.digest) for plan in plans]
        new: dict[int, dict[str, Plan | None]] = {}
        for key, plan in zip(keys, plans, strict=True):
            known = self._known.setdefault(key, np.zeros(0))
            if not isinstance(known, Failure) and len(known) < stop:
                new.setdefault(len(known), {})[key[1]] = plan
        for start, some in new.items():
            self._ask(rows, some, start, stop)
        found = [self._known[key] for key in keys]
        return [x if isinstance(x, Failure) else x[:stop] for x in found]

    def _ask(self, rows: RowSet, plans: Mapping[str, Plan | None], start: int, stop: int) -> None:
        request = {"rows": rows.name, "start": start, "stop": stop, "plans": list(plans)}
        entry = self._journal.call(
            request, lambda: self._run(rows, list(plans.values()), rows.rows[start:stop])
        )
        self.cost.calls += 1
        self.cost.wall_seconds += entry["wall_seconds"]
        self.cost.cpu_seconds += entry["cpu_seconds"]
        if "error" in entry and len(plans) > 1:
            for digest, plan in plans.items():
                self._ask(rows, {digest: plan}, start, stop)
            return
        if "error" not in entry:
            self.cost.rows += len(plans) * (stop - start)
        results = entry.get("results") or [{"failure": entry["error"]}]
        for digest, result in zip(plans, results, strict=True):
            key = (rows.name, digest)
            known = self._known[key]
            decoded = _decode(result)
            if isinstance(known, Failure) or isinstance(decoded, Failure):
                self._known[key] = decoded
            else:
                self._known[key] = np.concatenate([known, decoded])

    def _run(self, rows: RowSet, plans: list[Plan | None], places: tuple[int, ...]) -> Entry:
        self.check_cancelled()
        wall, cpu = time.perf_counter(), time.process_time()
        entry: Entry = {}
        try:
            values = rows.task.values(self._engine, plans, places)
            entry["results"] = [_encode(row) for row in np.asarray(values, np.float64)]
        except EngineError as error:
            self.check_alive(rows, error)
            entry["error"] = str(error)
        entry["wall_seconds"] = round(time.perf_counter() - wall, 6)
        entry["cpu_seconds"] = round(time.process_time() - cpu, 6)
        return entry

    def check_cancelled(self) -> None:
        """Stop before something long, if told to.

        Raises:
            SearchCancelledError: the event is set.
        """
        if self._cancel is not None and self._cancel.is_set():
            raise SearchCancelledError(
                f"cancelled; run it again with the same arguments and the folder "
                f"{self._journal.path.parent} to go on from here"
            )

    def check_alive(self, rows: RowSet, reason: EngineError) -> None:
        """Ask for the full model on one row, after a plan failed with ``reason``.

        Not recorded: a dead engine says nothing about the plans it was asked for.

        Raises:
            EngineError: it fails as well.
        """
        try:
            rows.task.values(self._engine, [None], rows.rows[:1])
        except EngineError as error:
            raise EngineError(
                f"the engine fails on the full model, too ({error}), after: {reason}. All before "
                f"is kept in {self._journal.path.parent}; run it again to go on"
            ) from reason


def _encode(values: Values) -> Entry:
    """Compact and exact: a digit for each row where all are 0 or 1, else floats."""
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        return {"failure": f"{bad} of {len(values)} values are not finite"}
    if np.isin(values, (0, 1)).all():
        return {"values": "".join("1" if value else "0" for value in values)}
    return {"values": values.tolist()}


def _decode(result: Entry) -> Values | Failure:
    if "failure" in result:
        return Failure(result["failure"])
    return np.array([float(value) for value in result["values"]])
