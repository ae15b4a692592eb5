"""An engine that notes what a job costs, and stops between two calls when told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from liveprune.pruning.evaluation.engine import AnswerScores, Engine, TokenRow
from liveprune.pruning.plan import Plan
from liveprune.pruning.search.evaluator import SearchCancelledError


class Meter:
    """What a job took, the parts before a resume included."""

    def __init__(
        self, before: Mapping[str, Any], tell: Callable[[Mapping[str, Any]], None]
    ) -> None:
        """``before``: the cost that the store has; ``tell``: given the cost after each call."""
        self._before = dict(before)
        self._tell = tell
        self._engine_seconds = 0.0
        self._tokens = 0
        self._evaluations = 0

    @property
    def cost(self) -> dict[str, float]:
        """``cpu_seconds`` of the worker, ``engine_seconds`` in calls of the engine, waiting
        included, ``tokens`` read or written under plans, ``evaluations``: plans in all calls.
        """
        now = {
            "cpu_seconds": round(time.process_time(), 3),
            "engine_seconds": round(self._engine_seconds, 3),
            "tokens": self._tokens,
            "evaluations": self._evaluations,
        }
        counted = {name: self._before.get(name, 0) + value for name, value in now.items()}
        return {**self._before, **counted}

    def add(self, seconds: float, tokens: int, plans: int) -> None:
        """Count one call."""
        self._engine_seconds += seconds
        self._tokens += tokens
        self._evaluations += plans
        self._tell(self.cost)


class MeteredEngine:
    """Fulfils ``pruning.evaluation.engine.Engine`` over another."""

    def __init__(self, engine: Engine, meter: Meter, cancelled: threading.Event) -> None:
        self._engine = engine
        self._meter = meter
        self._cancelled = cancelled

    def score(
        self,
        plans: Sequence[Plan | None],
        rows: Sequence[TokenRow],
        *,
        against_full: bool = False,
    ) -> list[AnswerScores]:
        tokens = sum(len(row.prompt) + len(row.answer) for row in rows)
        begun = self._begin()
        found = self._engine.score(plans, rows, against_full=against_full)
        self._meter.add(time.monotonic() - begun, len(plans) * tokens, len(plans))
        return found

    def generate(
        self,
        plans: Sequence[Plan | None],
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[list[tuple[int, ...]]]:
        begun = self._begin()
        found = self._engine.generate(plans, prompts, max_tokens=max_tokens, end=end)
        written = sum(len(answer) for answers in found for answer in answers)
        tokens = len(plans) * sum(map(len, prompts)) + written
        self._meter.add(time.monotonic() - begun, tokens, len(plans))
        return found

    def _begin(self) -> float:
        if self._cancelled.is_set():
            raise SearchCancelledError("told to stop")
        return time.monotonic()
