from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from liveprune.patches.background_thread import NICE, in_background

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads")
CPU = torch.device("cpu")
CORES = os.sched_getaffinity(0)


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def in_background_thread(work: Callable[[], Any]) -> Any:
    def run() -> Any:
        with in_background(CPU):
            return work()

    return in_thread(run)


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def parallel() -> set[str]:
    """The limits of torch's parallel libraries for the calling thread."""
    lines = torch.__config__.parallel_info().splitlines()
    return {line.strip() for line in lines if "get_max_threads" in line}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Parallel regions of new threads have two."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_low_priority() -> None:
    before = priority()
    assert in_background_thread(priority) == max(NICE, before)
    assert priority() == before


def test_a_refused_priority_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    assert in_background_thread(priority) == priority()


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_cores_of_the_whole_process() -> None:
    def pinned() -> tuple[set[int], set[int]]:
        os.sched_setaffinity(0, {min(CORES)})
        inherited = in_thread(lambda: os.sched_getaffinity(0))
        return inherited, in_background_thread(lambda: os.sched_getaffinity(0))

    assert in_thread(pinned) == ({min(CORES)}, CORES)


@pytest.mark.usefixtures("two_threads")
def test_no_helpers_in_parallel_regions() -> None:
    assert in_thread(torch.get_num_threads) == 2
    both, alone = parallel(), in_background_thread(parallel)
    assert all(line.endswith(": 2") for line in both)
    assert all(line.endswith(": 1") for line in alone)
    assert len(alone) == len(both) > 0
    assert parallel() == both, "other threads keep theirs"


def test_rows_made_by_the_worker_can_be_written() -> None:
    with torch.inference_mode():
        rows = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        in_thread(lambda: rows[0].copy_(torch.ones(3)))
    in_background_thread(lambda: rows[0].copy_(torch.ones(3)))
    assert rows.tolist() == [[1, 1, 1], [0, 0, 0]]
