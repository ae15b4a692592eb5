"""A search killed with SIGKILL, at random moments, again and again."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path

from liveprune.pruning.search.result import SearchResult
from tests.pruning.search.fakes import FakeTask
from tests.pruning.search.test_run import facts, overlap, sets

Search = Callable[..., SearchResult]


def slow_sets() -> dict[str, FakeTask]:
    data = sets(overlap, binary=True)
    for task in data.values():
        task.before = lambda plans: time.sleep(0.002)
    return data


def test_killed_and_resumed_ends_as_unbroken(run_search: Search, tmp_path: Path) -> None:
    unbroken = run_search(**sets(overlap, binary=True), folder=tmp_path / "unbroken")
    size = (tmp_path / "unbroken" / "journal.jsonl").stat().st_size
    journal = tmp_path / "search" / "journal.jsonl"
    moments = random.Random(0)
    killed = 0
    for length in sorted(moments.randrange(size * 9 // 10) for _ in range(8)):
        # Forked, so that each attempt need not import everything again.
        process = multiprocessing.get_context("fork").Process(target=run_search, kwargs=slow_sets())
        process.start()
        while process.is_alive() and not (journal.exists() and journal.stat().st_size >= length):
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.005))
        process.kill()
        process.join()
        killed += process.exitcode == -9
    assert killed >= 4  # the others had ended before: the journal was nearly whole
    result = run_search(**sets(overlap, binary=True))
    assert facts(result) == facts(unbroken)
    assert result.plan == unbroken.plan
