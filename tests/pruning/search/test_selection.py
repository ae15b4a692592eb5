from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from liveprune.pruning.errors import EngineError
from liveprune.pruning.plan import Plan
from liveprune.pruning.search.candidate import Candidate
from liveprune.pruning.search.evaluator import Evaluator
from liveprune.pruning.search.genome import Genome, make_space, one_hot
from liveprune.pruning.search.journal import open_folder
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.row_sets import RowSet
from liveprune.pruning.search.selection import reselect
from tests.pruning.search.fakes import FakeTask, candidate, spec_of

SPACE = make_space(spec_of(5, layers=1), Settings(), experts=1)


def made(index: int, train: float, **state: object) -> Candidate:
    """The candidate that keeps expert ``index``."""
    rows = (one_hot([index], 5),)
    return candidate(SPACE, Genome(rows, rows), index, train, **state)


def dev_of(*scores: float) -> RowSet:
    def fitness(plan: Plan | None, row: int) -> float:
        assert plan is not None
        return scores[plan.layers[0].kept[0]]

    return RowSet("dev", FakeTask(fitness, 2, "dev"), (0, 1))


@pytest.fixture
def evaluator(tmp_path: Path) -> Iterator[Evaluator]:
    with open_folder(tmp_path, {}) as journal:
        yield Evaluator(None, journal)


def test_dev_decides_among_the_best_by_train(evaluator: Evaluator) -> None:
    population = [
        made(0, 0.5),
        made(1, 0.9),
        made(2, 0.8),
        made(3, 0.7),
        made(4, 0.95, dropped=True),
    ]
    dev = dev_of(1.0, 0.2, 0.4, 0.6, 1.0)
    selection = reselect(evaluator, dev, population, None, 3)
    assert [x.index for x, _ in selection.ranking] == [3, 2, 1]
    assert selection.winner.index == 3
    assert selection.train_best[0].index == 1
    assert selection.ranking[0][1].tolist() == [0.6, 0.6]


def test_the_previous_winner_stands_again(evaluator: Evaluator) -> None:
    population = [made(0, 0.5), made(1, 0.9), made(2, 0.8)]
    selection = reselect(evaluator, dev_of(0.7, 0.6, 0.6, 0, 0), population, population[0], 2)
    assert selection.winner.index == 0
    assert len(selection.ranking) == 3


def test_ties_go_to_the_better_by_train_then_the_earlier(evaluator: Evaluator) -> None:
    population = [made(0, 0.5), made(1, 0.9), made(2, 0.9), made(3, 0.7)]
    selection = reselect(evaluator, dev_of(0.6, 0.6, 0.6, 0.6, 0), population, None, 20)
    assert [x.index for x, _ in selection.ranking] == [1, 2, 3, 0]


def test_who_fails_on_dev_does_not_win(evaluator: Evaluator) -> None:
    population = [made(0, 0.5), made(1, 0.9)]
    selection = reselect(evaluator, dev_of(0.1, np.nan, 0, 0, 0), population, None, 20)
    assert selection.winner.index == 0
    assert selection.train_best[0].index == 0


def test_nobody_left(evaluator: Evaluator) -> None:
    with pytest.raises(EngineError, match=r"none of 1 candidates .* 2 of 2 values are not finite"):
        reselect(evaluator, dev_of(np.nan, 0, 0, 0, 0), [made(0, 0.5)], None, 20)
    failed = [made(0, 0.5, failure="first"), made(1, 0.5, failure="second")]
    with pytest.raises(EngineError, match=r"none of 2 candidates .* first"):
        reselect(evaluator, dev_of(0, 0, 0, 0, 0), failed, None, 20)
