from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.errors import EngineError
from liveprune.server.ray_work import Chunk, Work
from tests.server.pool_engines import make_plan


def sizes(plans: int, workers: int, least: int = 1) -> list[int]:
    work = Work([None] * plans, workers, least)
    found = []
    while chunk := work.take(0, []):
        found.append(chunk.stop - chunk.start)
    return found


def test_chunks_are_large_first_and_small_at_the_end() -> None:
    # 24 // 4 = 6, 18 // 4 = 4, 14 // 4 = 3, 11 // 4 = 2, 9 // 4 = 2, then 7, 6, ... // 4 = 1.
    assert sizes(24, 2) == [6, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    assert sizes(8, 2) == [2, 1, 1, 1, 1, 1, 1]
    assert sizes(3, 8) == [1, 1, 1]
    assert sizes(10, 2, least=4) == [4, 4, 2]
    assert sizes(0, 2) == []


@given(st.integers(0, 28), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_results_go_by_place_whoever_gives_them_and_whoever_dies(
    count: int, workers: int, least: int, seed: int
) -> None:
    moment = random.Random(seed)
    plans = [make_plan(i) for i in range(count)]
    work = Work(plans, workers, least)
    running: dict[int, Chunk] = {}
    dead: set[int] = set()
    while not work.finished:
        idle = [w for w in range(workers) if w not in running]
        moment.shuffle(idle)
        for worker in idle:
            others = [w for w in range(workers) if w != worker]
            if (chunk := work.take(worker, others)) is not None:
                assert chunk.lost_on != worker or not others
                running[worker] = chunk
        worker = moment.choice(sorted(running))
        chunk = running.pop(worker)
        places = set(range(chunk.start, chunk.stop))
        if moment.random() < 0.3 and not places & dead:  # a plan dies once at most
            dead |= places
            assert work.lose(chunk, worker, "killed") == []
        else:
            work.answer(chunk, [plan.digest for plan in plans[chunk.start : chunk.stop]])
    assert work.results() == [plan.digest for plan in plans]


def test_a_lost_chunk_comes_back_plan_by_plan_and_to_others() -> None:
    work = Work([None] * 8, 2)
    first = work.take(0, [1])
    assert first == Chunk(0, 2)
    assert work.lose(first, 0, "killed") == []
    assert work.take(1, [0]) == Chunk(0, 1, lost_on=0)
    assert work.take(0, [1]) == Chunk(2, 3)
    assert work.take(0, []) == Chunk(1, 2, lost_on=0)


def test_the_second_death_is_the_plans_fault() -> None:
    plans = [make_plan(i) for i in range(8)]
    work = Work(plans, 2)
    first = work.take(0, [1])
    assert first == Chunk(0, 2)
    work.lose(first, 0, "killed")
    again = work.take(1, [0])
    assert again == Chunk(0, 1, lost_on=0)
    other = work.take(0, [1])
    assert other == Chunk(2, 3)
    assert work.lose(again, 1, "out of memory") == [0, 1]
    assert not work.finished
    assert work.take(1, [0]) is None
    work.answer(other, [1.0])
    assert work.finished
    with pytest.raises(
        EngineError, match=f"plan {plans[0].digest}: 2 actors died .* the last: out of memory"
    ):
        work.results()


def test_the_full_model_is_named_as_such() -> None:
    work = Work([None], 1)
    for _ in range(2):
        chunk = work.take(0, [])
        assert chunk is not None
        work.lose(chunk, 0, "killed")
    with pytest.raises(EngineError, match="the full model: 2 actors died"):
        work.results()


def test_the_first_error_by_place_is_raised_whenever_it_came() -> None:
    work = Work([None] * 8, 8)
    early, late = work.take(0, []), work.take(1, [])
    assert early is not None
    assert late is not None
    work.refuse(late, EngineError("late"))
    work.refuse(early, EngineError("early"))
    assert work.finished
    with pytest.raises(EngineError, match="early"):
        work.results()
