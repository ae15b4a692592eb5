from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveprune.pruning.errors import EngineError
from liveprune.pruning.plan import Plan
from liveprune.pruning.search.candidate import Candidate
from liveprune.pruning.search.evaluator import Evaluator, Failure, SearchCancelledError
from liveprune.pruning.search.genome import Genome, make_space, one_hot
from liveprune.pruning.search.journal import Journal, open_folder
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.racing import race
from liveprune.pruning.search.row_sets import RowSet
from tests.pruning.search.fakes import FakeTask, spec_of

SPACE = make_space(spec_of(layers=1), Settings(), experts=1)


def genome(expert: int) -> Genome:
    rows = (one_hot([expert], 4),)
    return Genome(rows, rows)


PLANS = [SPACE.plan(genome(expert)) for expert in range(4)]


def by_expert(plan: Plan | None, row: int) -> float:
    """0.1 for expert 0 to 0.4, the full model 0.5; a little more in later rows."""
    return (0.5 if plan is None else 0.1 + plan.layers[0].kept[0] / 10) + row / 1000


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with open_folder(tmp_path, {}) as journal:
        yield journal


def rows_of(task: FakeTask, order: Sequence[int] | None = None) -> RowSet:
    return RowSet("train", task, tuple(order or range(task.size)))


def numbers(results: Sequence[Any]) -> list[Any]:
    return [x.message if isinstance(x, Failure) else np.round(x, 9).tolist() for x in results]


def test_each_plan_and_row_is_asked_for_once(journal: Journal) -> None:
    task = FakeTask(by_expert, 3)
    evaluator = Evaluator(None, journal)
    rows = rows_of(task, [2, 0, 1])
    assert numbers(evaluator.score(rows, PLANS[:2], 2)) == [[0.102, 0.1], [0.202, 0.2]]
    assert numbers(evaluator.score(rows, [PLANS[0], PLANS[0]])) == [[0.102, 0.1, 0.101]] * 2
    assert numbers(evaluator.score(rows, [PLANS[0], None], 1)) == [[0.102], [0.502]]
    digests = [plan.digest for plan in PLANS]
    assert task.calls == [(digests[:2], [2, 0]), (digests[:1], [1]), (["full"], [2])]
    assert (evaluator.cost.calls, evaluator.cost.rows) == (3, 6)


def test_values_come_back_from_the_journal_exactly(journal: Journal) -> None:
    exact = FakeTask(lambda plan, row: 1 / 3 + row / 7, 2)
    binary = FakeTask(by_expert, 50, "b", binary=True)
    sets = [RowSet("train", exact, (0, 1)), RowSet("dev", binary, tuple(range(50)))]
    first = Evaluator(None, journal)
    found = [first.score(x, [None, PLANS[0]]) for x in sets]
    again = Evaluator(None, Journal(journal.path))
    for x, results in zip(sets, found, strict=True):
        for one, other in zip(results, again.score(x, [None, PLANS[0]]), strict=True):
            assert np.array_equal(one, other)
    assert len(exact.calls) == len(binary.calls) == 1
    assert again.cost == first.cost
    assert len(json.loads(journal.path.read_text().splitlines()[1])["results"][0]["values"]) == 50


def test_a_batch_that_fails_is_asked_for_one_by_one(journal: Journal) -> None:
    def before(plans: Sequence[Plan | None]) -> None:
        if PLANS[1] in plans:
            raise EngineError("out of memory")

    task = FakeTask(by_expert, 2)
    task.before = before
    evaluator = Evaluator(None, journal)
    expected = [[0.1, 0.101], "out of memory", [0.3, 0.301]]
    assert numbers(evaluator.score(rows_of(task), PLANS[:3])) == expected
    asked = [names for names, _ in task.calls]
    assert asked == [
        [x.digest for x in PLANS[:3]],
        ["full"],  # is the engine alive?
        [PLANS[0].digest],
        [PLANS[1].digest],
        ["full"],
        [PLANS[2].digest],
    ]
    assert numbers(evaluator.score(rows_of(task), PLANS[:3])) == expected
    again = Evaluator(None, Journal(journal.path))
    assert numbers(again.score(rows_of(task), PLANS[:3])) == expected
    assert len(task.calls) == 6
    assert evaluator.cost.rows == 4


def test_nan_is_a_failure_of_that_plan_alone(journal: Journal) -> None:
    task = FakeTask(
        lambda plan, row: np.nan if plan == PLANS[0] and row else by_expert(plan, row), 3
    )
    results = Evaluator(None, journal).score(rows_of(task), PLANS[:2])
    assert numbers(results) == ["2 of 3 values are not finite", [0.2, 0.201, 0.202]]


def test_a_dead_engine_ends_the_search_and_nothing_is_recorded(journal: Journal) -> None:
    def dead(plans: Sequence[Plan | None]) -> None:
        raise EngineError("worker died")

    task = FakeTask(by_expert, 2)
    task.before = dead
    with pytest.raises(EngineError, match=r"fails on the full model, too \(worker died\)"):
        Evaluator(None, journal).score(rows_of(task), PLANS)
    assert journal.path.read_bytes() == b""
    task.before = lambda plans: None
    Evaluator(None, Journal(journal.path)).score(rows_of(task), PLANS)
    assert task.calls[-1][0] == [x.digest for x in PLANS]


def test_cancel_before_a_call(journal: Journal) -> None:
    task = FakeTask(by_expert, 2)
    cancel = threading.Event()
    evaluator = Evaluator(None, journal, cancel)
    evaluator.score(rows_of(task), PLANS[:1])
    cancel.set()
    evaluator.score(rows_of(task), PLANS[:1])
    with pytest.raises(SearchCancelledError, match="run it again with the same arguments"):
        evaluator.score(rows_of(task), PLANS[:2])


def batch(*experts: int) -> list[Candidate]:
    return [Candidate(i, "prune", genome(i), PLANS[i]) for i in experts]


def noisy(plan: Plan | None, row: int) -> float:
    """Expert e is right on rows where row % 10 < 3 e."""
    return float(plan is not None and row % 10 < 3 * plan.layers[0].kept[0])


def test_a_race_drops_what_is_clearly_worse(journal: Journal) -> None:
    task = FakeTask(noisy, 45)
    runners = batch(0, 2, 3)
    evaluator = Evaluator(None, journal)
    race(evaluator, rows_of(task), runners, None, Settings(block=20, race_z=3.0))
    # After 20 rows: 0, 0.6 and 0.9. Expert 2 misses 6 rows of 20 that expert 3 has:
    # z = 0.3 / (0.4702 / sqrt(20)) = 2.85. Expert 0 misses 18: z = 0.9 / (0.3078 / sqrt(20)) = 13.
    assert [x.dropped for x in runners] == [True, True, False]
    assert [len(x.values) for x in runners] == [20, 40, 45]  # 40 rows: z = 4.1
    assert [x.mean for x in runners] == pytest.approx([0, 0.6, 41 / 45])
    assert [len(rows) for _, rows in task.calls] == [20, 20, 5]


def test_a_race_against_the_best_so_far(journal: Journal) -> None:
    task = FakeTask(noisy, 40)
    evaluator = Evaluator(None, journal)
    (best,) = first = batch(3)
    race(evaluator, rows_of(task), first, None, Settings(block=20))
    (worse,) = second = batch(0)
    race(evaluator, rows_of(task), second, best, Settings(block=20))
    assert worse.dropped
    assert not worse.complete


def test_the_last_block_drops_nothing_and_neither_does_no_racing(journal: Journal) -> None:
    task = FakeTask(noisy, 40)
    for settings in (Settings(block=40), Settings(block=10, racing=False)):
        runners = batch(0, 3)
        race(Evaluator(None, journal), rows_of(task), runners, None, settings)
        assert all(x.complete and len(x.values) == 40 for x in runners)
        journal = Journal(journal.path)


def test_a_failed_runner_is_out(journal: Journal) -> None:
    task = FakeTask(lambda plan, row: np.nan if plan == PLANS[3] and row > 20 else 0.5, 40)
    runners = batch(2, 3)
    race(Evaluator(None, journal), rows_of(task), runners, None, Settings(block=20))
    assert [x.complete for x in runners] == [True, False]
    assert runners[1].mean == -np.inf
    assert runners[1].failure == "19 of 20 values are not finite"
