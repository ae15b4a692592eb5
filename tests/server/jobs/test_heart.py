"""A worker's heart, and what it tells of progress and cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveprune.pruning.errors import StoreError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.search.evaluator import SearchCancelledError
from liveprune.pruning.search.run import Progress
from liveprune.server.jobs.attempts import STALLS, begun, hopeless, settled
from liveprune.server.jobs.heart import Heart
from liveprune.server.jobs.metered_engine import Meter, MeteredEngine
from liveprune.server.jobs.tracker import Tracker
from liveprune.server.store.store import Store

LEASE = 0.6


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path, "m")
    yield made
    made.close()


class Lost:
    """Notes that the heart gave up."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self) -> None:
        self.event.set()


def heart(store: Store, lease: float = LEASE) -> tuple[str, Heart, Lost]:
    job = store.jobs.add({})
    store.jobs.claim("me", lease)
    lost = Lost()
    return job.id, Heart(store.jobs, job.id, "me", lease, on_lost=lost), lost


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_keeps_the_lease(store: Store) -> None:
    job, alive, lost = heart(store)
    first = store.jobs.get(job).lease_until
    assert first is not None
    with alive:
        until(lambda: (store.jobs.get(job).lease_until or 0) > first + 2 * LEASE)
        assert store.jobs.claim("another", LEASE) is None
    assert not lost.event.is_set()


def test_it_carries_the_newest_news_and_the_last(store: Store) -> None:
    job, alive, _ = heart(store, lease=600)
    with alive:
        alive.tell(progress={"done": 1}, best={"fitness": 0.5})
        until(lambda: store.jobs.get(job).progress == {"done": 1})
        for done in range(2, 50):
            alive.tell(progress={"done": done}, cost={"tokens": done})
    found = store.jobs.get(job)
    assert (found.progress, found.best, found.cost) == (
        {"done": 49},
        {"fitness": 0.5},
        {"tokens": 49},
    )


def test_it_brings_the_cancellation(store: Store) -> None:
    job, alive, _ = heart(store)
    with alive:
        assert not alive.cancelled.is_set()
        store.jobs.ask_cancel(job)
        assert alive.cancelled.wait(60)
        assert alive.cancel_asked


def test_it_tells_that_the_job_is_anothers(store: Store) -> None:
    job, alive, lost = heart(store)
    store.jobs.give_back(job, "me")
    with alive:
        assert lost.event.wait(60)


def test_a_database_that_is_away_for_a_moment_loses_nothing(store: Store) -> None:
    job, alive, lost = heart(store, lease=3)
    beat, failures = store.jobs.beat, [StoreError("away")] * 2

    def fails(*arguments: Any, **named: Any) -> Any:
        if failures:
            raise failures.pop()
        return beat(*arguments, **named)

    store.jobs.beat = fails  # type: ignore[method-assign]
    with alive:
        alive.tell(cost={"tokens": 7})
        until(lambda: store.jobs.get(job).cost == {"tokens": 7})
    assert not lost.event.is_set()


def test_a_database_that_stays_away_ends_the_work(store: Store) -> None:
    _, alive, lost = heart(store)

    def fails(*_: Any, **__: Any) -> Any:
        raise StoreError("away")

    store.jobs.beat = fails  # type: ignore[method-assign]
    with alive:
        assert lost.event.wait(60)


class Told:
    """Stands for a heart."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.news: list[dict[str, Any]] = []

    def tell(self, **news: Any) -> None:
        self.news.append(news)


def test_time_left_is_reckoned_from_what_was_not_replayed() -> None:
    told, now = Told(), [0.0]
    tracker = Tracker(told, clock=lambda: now[0])  # type: ignore[arg-type]
    for done, replaying in ((0, True), (40, True), (50, False)):
        tracker.search(Progress("prune", done, 100, None, replaying))
        now[0] += 1
    now[0] = 23.0  # 40 was at 1, so 20 candidates took 22 seconds
    tracker.search(Progress("merge", 60, 100, 0.75, replaying=False))
    assert told.news[-1] == {"best": {"fitness": 0.75, "stage": "merge"}}
    assert told.news[-2]["progress"] == {
        "stage": "merge",
        "done": 60,
        "total": 100,
        "ratio": 0.6,
        "seconds_left": 44.0,
    }
    left = [x["progress"]["seconds_left"] for x in told.news if "progress" in x]
    assert left[:2] == [None, None]


def test_steps_stop_when_cancelled_and_say_only_now_and_then() -> None:
    told, now = Told(), [0.0]
    tracker = Tracker(told, clock=lambda: now[0])  # type: ignore[arg-type]
    step = tracker.steps("plan")
    for done in range(101):
        step(done, 100)
        now[0] += 0.01
    shown = [x["progress"]["done"] for x in told.news]
    assert shown[0] == 0
    assert shown[-1] == 100
    assert len(shown) < 10
    told.cancelled.set()
    with pytest.raises(SearchCancelledError):
        step(100, 100)


class Engine:
    """Answers anything."""

    def score(self, plans: Any, rows: Any, *, against_full: bool) -> Any:
        scores = AnswerScores(np.zeros(3, np.int64), np.zeros(3))
        return [scores for _ in plans]

    def generate(self, plans: Any, prompts: Any, *, max_tokens: int, end: Any) -> Any:
        return [[(1, 2) for _ in prompts] for _ in plans]


def test_the_cost_counts_tokens_and_plans_and_goes_on_after_a_resume() -> None:
    told: list[Any] = []
    meter = Meter({"tokens": 100, "evaluations": 5, "cpu_seconds": 1.0, "other": 3}, told.append)
    cancelled = threading.Event()
    engine = MeteredEngine(Engine(), meter, cancelled)  # type: ignore[arg-type]
    engine.score([None, None], [TokenRow((1, 2), (3,)), TokenRow((1,), (2, 3))])
    assert (told[-1]["tokens"], told[-1]["evaluations"]) == (100 + 2 * 6, 7)
    engine.generate([None], [(1, 2, 3), (4,)], max_tokens=9, end=())
    assert (told[-1]["tokens"], told[-1]["evaluations"]) == (112 + 4 + 4, 8)
    assert told[-1]["cpu_seconds"] > 1.0
    assert told[-1]["other"] == 3
    cancelled.set()
    with pytest.raises(SearchCancelledError):
        engine.score([None], [])


def test_attempts_that_get_nowhere_are_counted() -> None:
    cost: dict[str, Any] = {}
    for _ in range(STALLS):
        cost = begun(cost)
        assert not hopeless(cost)
    assert hopeless(begun(cost))
    assert not hopeless(begun({**cost, "evaluations": 1})), "it got somewhere"
    assert not hopeless(begun(settled(cost))), "it ended in order"
    assert settled({**cost, "tokens": 7}) == {"tokens": 7}
