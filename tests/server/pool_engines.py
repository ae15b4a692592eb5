"""Engines without a model for the tests of the pool; actors import this module."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from liveprune.pruning.errors import EngineError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.plan import Lineage, Plan


def make_plan(number: int) -> Plan:
    """Plans 0 to 27: each keeps another pair of 8 experts."""
    pairs = [(i, j) for i in range(8) for j in range(i + 1, 8)]
    layer = LayerPlan(layer=0, experts=8, top_k=1, kept=pairs[number])
    return Plan("mixtral", 1, (layer,), Lineage("test"))


@dataclass(frozen=True)
class FakeDescription:
    model: Path
    folder: Path
    """Where the engines leave notes: a file for each call, and what they wait for."""
    acts: Mapping[str, str] = field(default_factory=dict)
    """By plan digest: die, die once, refuse, fail, wait."""
    start: str = ""
    """die, refuse, or nothing."""
    gpus: int = 0

    @contextmanager
    def started(self) -> Iterator[FakeEngine]:
        if self.start == "die":
            _die()
        if self.start == "refuse":
            raise EngineError("no memory for the model")
        yield FakeEngine(self)
        (self.folder / f"closed {os.getpid()}").touch()


class FakeEngine:
    """What it answers is told by plan and row alone; how it acts, by the description."""

    def __init__(self, description: FakeDescription) -> None:
        self._acts, self._folder = description.acts, description.folder
        self._calls = 0

    def score(
        self,
        plans: Sequence[Plan | None],
        rows: Sequence[TokenRow],
        *,
        against_full: bool = False,
    ) -> list[AnswerScores]:
        self._note(plans)
        compared = np.full(len(rows), 0.5) if against_full else None
        return [
            AnswerScores(
                np.array([row.answer[0] for row in rows]),
                np.array([value(plan, row.answer[0]) for row in rows]),
                compared,
                compared,
            )
            for plan in plans
        ]

    def generate(
        self,
        plans: Sequence[Plan | None],
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[list[tuple[int, ...]]]:
        self._note(plans)
        return [[(*prompt, max_tokens, *end) for prompt in prompts] for _ in plans]

    def _note(self, plans: Sequence[Plan | None]) -> None:
        names = [name(plan) for plan in plans]
        self._calls += 1
        (self._folder / f"call {os.getpid()} {self._calls}").write_text("\n".join(names))
        for plan in names:
            self._act(self._acts.get(plan, ""), plan)

    def _act(self, act: str, plan: str) -> None:
        if act == "die once":
            act = "" if (self._folder / "died").exists() else "die"
            (self._folder / "died").touch()
        if act == "die":
            _die()
        if act == "refuse":
            raise EngineError(f"plan {plan}: found no room")
        if act == "fail":
            raise ZeroDivisionError("a bug")
        if act == "wait":
            (self._folder / f"waiting {os.getpid()}").touch()
            while not (self._folder / "go").exists():
                time.sleep(0.005)


def name(plan: Plan | None) -> str:
    return "full" if plan is None else plan.digest


def value(plan: Plan | None, token: int) -> float:
    return (sum(name(plan).encode()) * 7 + token) / 3


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
