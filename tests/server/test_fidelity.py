from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveprune.pruning.errors import ConflictError, IncompatibleEnvironmentError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.plan import Plan
from liveprune.server.experiments.definition import experiment_from
from liveprune.server.experiments.live import Assignment, LiveExperiments, Running
from liveprune.server.fidelity import ANSWER, LONGEST, SAME, WAITING, Fidelity
from tests.server.fake_engine import plan_number
from tests.server.live_world import A, B, World, run, world


def experiments(*, control: str = "full", treatment: str = "a") -> LiveExperiments:
    form: dict[str, Any] = {"name": "x", "model": "m", "control": "one"}
    form |= {"primary": {"metric": "e2e_seconds"}, "warm_up_seconds": 0}
    form["arms"] = [
        {"name": "one", "variant": control, "weight": 0.5},
        {"name": "two", "variant": treatment, "weight": 0.5},
    ]
    experiment = experiment_from(form)
    found = LiveExperiments(b"salt", lambda: 100.0)
    found.install([Running(experiment, (experiment.shares,), 0.0)])
    return found


def assignment(arm: str, variant: str, **changes: Any) -> Assignment:
    fields: dict[str, Any] = {"experiment": "x", "arm": arm, "variant": variant, "shadow": None}
    fields |= {"phase": 0, "unit": 1, "counted": True, "fidelity": 1.0}
    return Assignment(**{**fields, **changes})


def cell(found: LiveExperiments, arm: str, metric: str) -> tuple[int, float]:
    """Number of values and their mean."""
    measured = found.measured("x")
    assert measured is not None
    moments = measured.phases[0].cell(arm, metric).moments
    return moments.count, moments.mean


class Scores:
    """Answers to ``score`` in the place of the engine's."""

    def __init__(self) -> None:
        self.calls: list[tuple[Sequence[Plan | None], list[TokenRow], Plan | None]] = []
        self.fails: list[Exception] = []
        self.found: Callable[[int, int], AnswerScores] = lambda _, n: flat(n)

    async def score(
        self,
        plans: Sequence[Plan | None],
        rows: Sequence[TokenRow],
        *,
        against_full: bool,
        reference: Plan | None,
    ) -> list[AnswerScores]:
        assert against_full
        if self.fails:
            raise self.fails.pop(0)
        self.calls.append((plans, list(rows), reference))
        tokens = sum(len(row.answer) for row in rows)
        return [self.found(i, tokens) for i in range(len(plans))]


def flat(tokens: int, value: float = 0.5) -> AnswerScores:
    values = np.full(tokens, value)
    return AnswerScores(np.zeros(tokens, np.int64), values, values, values)


async def settle(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def make(w: World, found: LiveExperiments, scores: Scores, **options: Any) -> Fidelity:
    return Fidelity(lambda: scores, w.registry, found, **options)  # type: ignore[arg-type, return-value]


def test_each_answer_gets_its_own_numbers(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            found, scores = experiments(), Scores()

            def by_plan(plan: int, tokens: int) -> AnswerScores:
                assert tokens == 5
                if plan == 0:
                    logs = np.array([-1.0, -2.0, -1.0, -1.0, -1.0])
                    return AnswerScores(np.array([7, 8, 1, 2, 3]), logs, np.ones(5), np.zeros(5))
                logs = np.array([-2.0, -5.0, -1.5, -1.5, -1.5])
                overlap = np.array([0.5, 0.7, 1.0000001, 1.0, 1.0])
                predicted = np.array([7, 9, 1, 2, 4])
                return AnswerScores(predicted, logs, overlap, np.array([0.2, 0.4, 3, 3, 3]))

            scores.found = by_plan
            fidelity = make(w, found, scores)
            async with fidelity.running():
                fidelity.offer(assignment("two", "a"), (1, 2), (7, 8))
                fidelity.offer(assignment("two", "a"), (1,), (1, 2, 3))
                await settle(lambda: cell(found, "two", "kl")[0] == 2)
            ((plans, rows, reference),) = scores.calls
            assert [plan and plan.digest for plan in plans] == [None, A.digest]
            assert reference is None
            assert rows == [TokenRow((1, 2), (7, 8)), TokenRow((1,), (1, 2, 3))]
            expected = {
                "agreement": (0.6 + 1.0) / 2,
                "top1_agreement": (1 / 2 + 2 / 3) / 2,
                "kl": (0.3 + 3) / 2,
                "log_likelihood_gap": (2.0 + 0.5) / 2,
            }
            for metric, mean in expected.items():
                assert cell(found, "two", metric) == (2, pytest.approx(mean))

    run(test())


def test_the_reference_agrees_with_itself_without_being_asked(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            found, scores = experiments(), Scores()
            async with make(w, found, scores).running() as _:
                pass
            fidelity = make(w, found, scores)
            async with fidelity.running():
                fidelity.offer(assignment("one", "full"), (1,), (2,))
                await settle(lambda: cell(found, "one", "kl")[0] == 1)
            assert {metric: cell(found, "one", metric)[1] for metric in SAME} == SAME
            assert scores.calls == []

    run(test())


def test_without_the_full_model_the_control_arm_is_the_reference(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            await w.add("b", B)
            await w.swap("a")
            assert set(w.registry.live) == {"a", "b"}
            found = experiments(control="a", treatment="b")
            fidelity = Fidelity(lambda: w.control.candidates, w.registry, found)
            before = w.snapshot()
            async with fidelity.running():
                fidelity.offer(assignment("two", "b"), (1,), (2, 3))
                fidelity.offer(assignment("one", "a"), (1,), (2, 3))
                await settle(lambda: cell(found, "one", "kl")[0] == 1)
                await settle(lambda: cell(found, "two", "kl")[0] == 1)
            assert w.engine.references == [A]
            gap = plan_number(A) - plan_number(B)
            assert cell(found, "two", "log_likelihood_gap") == (1, gap)
            assert cell(found, "one", "log_likelihood_gap") == (1, 0.0)
            assert w.snapshot() == before

    run(test())


def test_shadows_are_scored_under_their_own_variant(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            found, scores = experiments(), Scores()
            fidelity = make(w, found, scores)
            async with fidelity.running():
                fidelity.offer(assignment("two", "full", shadow="a"), (1,), (2,))
                await settle(lambda: cell(found, "two", "kl")[0] == 1)
            assert scores.calls[0][0][1] == A

    run(test())


def test_what_gets_in_the_way_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liveprune.server.fidelity.RETRY_SECONDS", 0.001)

    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            found, scores = experiments(), Scores()
            scores.fails = [ConflictError("a swap"), ConflictError("switched off")]
            fidelity = make(w, found, scores)
            async with fidelity.running():
                fidelity.offer(assignment("two", "a"), (1,), (2,))
                await settle(lambda: cell(found, "two", "kl")[0] == 1)
                assert not scores.fails

    run(test())


def test_an_engine_that_cannot_says_so_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            found, scores = experiments(), Scores()
            scores.fails = [IncompatibleEnvironmentError("no priority scheduler")]
            fidelity = make(w, found, scores)
            async with fidelity.running():
                fidelity.offer(assignment("two", "a"), (1,), (2,))
                await settle(lambda: bool(fidelity.off))
                fidelity.offer(assignment("two", "a"), (1,), (2,))
                await asyncio.sleep(0.01)
            assert fidelity.off == "no priority scheduler"
            assert scores.calls == []

    run(test())


def test_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            found, scores = experiments(), Scores()
            fidelity = make(w, found, scores)
            scores.found = lambda _, n: flat(n, math.inf)
            async with fidelity.running():
                fidelity.offer(assignment("two", "gone"), (1,), (2,))
                fidelity.offer(assignment("two", "a"), (1,), (2,))
                await settle(lambda: bool(scores.calls))
                assert cell(found, "two", "kl")[0] == 0, "no number, no value"
                scores.found = lambda _, n: flat(n)
                fidelity.offer(assignment("two", "a"), (1,), (2,))
                await settle(lambda: cell(found, "two", "kl")[0] == 1)

    run(test())


def test_what_is_drawn_and_how_much_may_wait(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            found, scores = experiments(), Scores()
            draws = iter([0.2, 0.3, *[0.0] * 1000])
            fidelity = make(w, found, scores, draw=lambda: next(draws))
            fidelity.offer(assignment("two", "a", fidelity=0.3), (1,), (2,))
            fidelity.offer(assignment("two", "a", fidelity=0.3), (9,), (9,))  # 0.3: not drawn
            fidelity.offer(assignment("two", "a", counted=False), (9,), (9,))
            fidelity.offer(assignment("two", "a"), (9,) * LONGEST, (9,))
            fidelity.offer(assignment("two", "a"), (9,), ())
            fidelity.offer(assignment("two", "a"), (1,), (2,) * (ANSWER + 1))
            async with fidelity.running():
                await settle(lambda: cell(found, "two", "kl")[0] == 2)
            rows = [row for call in scores.calls for row in call[1]]
            assert rows == [TokenRow((1,), (2,)), TokenRow((1,), (2,) * ANSWER)]
            for number in range(WAITING + 1):
                fidelity.offer(assignment("two", "a"), (number,), (2,))
            scores.calls.clear()
            async with fidelity.running():
                await settle(lambda: cell(found, "two", "kl")[0] == 2 + WAITING)
            prompts = [row.prompt[0] for call in scores.calls for row in call[1]]
            assert prompts == list(range(1, WAITING + 1)), "the oldest had to go"
            assert all(len(call[1]) <= 8 for call in scores.calls)

    run(test())
