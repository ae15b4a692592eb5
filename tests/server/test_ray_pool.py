"""The pool over real actors of Ray with engines that have no model, and die when told to."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from liveprune.pruning.demo import model_path
from liveprune.pruning.errors import EngineError, IncompatibleEnvironmentError
from liveprune.pruning.evaluation.engine import TokenRow
from liveprune.pruning.search.evaluator import Evaluator, Failure
from liveprune.pruning.search.journal import open_folder
from liveprune.server import ray_pool as pools
from liveprune.server.ray_cluster import ray_cluster
from liveprune.server.ray_pool import RayPool
from tests.server.pool_engines import FakeDescription, make_plan, name, value

ROWS = [TokenRow((1, 2), (token,)) for token in range(5)]
PLANS = [None, *(make_plan(i) for i in range(11))]
EXPECTED = [[value(plan, row.answer[0]) for row in ROWS] for plan in PLANS]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Not for the whole session: threads of Ray's must not be there when other tests fork."""
    with ray_cluster(None, actors=4):
        yield


@pytest.fixture
def pool(cluster: None, tmp_path: Path) -> Iterator[Callable[..., RayPool]]:
    """``pool(actors, acts, **arguments)``, closed at the end."""
    made: list[RayPool] = []

    def make(
        actors: int, acts: dict[int, str] | None = None, start: str = "", **arguments: Any
    ) -> RayPool:
        named = {name(PLANS[i]): act for i, act in (acts or {}).items()}
        description = FakeDescription(model_path(), tmp_path, named, start)
        made.append(RayPool(description, actors, **arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


def scored(pool: RayPool, plans: Any = PLANS) -> list[list[float]]:
    return [x.logprobs.tolist() for x in pool.score(plans, ROWS)]


def wait_for_end(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=60)


def calls(folder: Path) -> dict[str, list[list[str]]]:
    """By process: the plans of each of its calls."""
    found: dict[str, list[list[str]]] = {}
    for path in sorted(folder.glob("call *"), key=lambda path: int(path.name.split()[2])):
        found.setdefault(path.name.split()[1], []).append(path.read_text().split())
    return found


@contextmanager
def killing(pool: RayPool, folder: Path) -> Iterator[list[int]]:
    """Once an engine waits in a call, kill its process, then let all go on."""
    killed: list[int] = []

    def kill() -> None:
        while not (found := list(folder.glob("waiting *"))):
            time.sleep(0.005)
        killed.append(int(found[0].name.split()[1]))
        os.kill(killed[0], signal.SIGKILL)
        (folder / "go").touch()

    thread = threading.Thread(target=kill)
    thread.start()
    yield killed
    thread.join()


def test_results_stand_in_the_order_of_the_plans(
    pool: Callable[..., RayPool], tmp_path: Path
) -> None:
    two = pool(2)
    assert scored(two) == EXPECTED
    answers = two.generate(PLANS, [(3,), (4, 5)], max_tokens=6, end={9})
    assert answers == [[(3, 6, 9), (4, 5, 6, 9)]] * len(PLANS)
    compared = two.score(PLANS[:3], ROWS, against_full=True)
    assert [x.overlap.tolist() for x in compared] == [[0.5] * 5] * 3
    assert two.score([], ROWS) == []
    by_process = calls(tmp_path)
    assert {int(pid) for pid in by_process} == {x.pid for x in two.processes}
    # A call's plans are all asked for, each once.
    asked = sorted(x for each in by_process.values() for some in each for x in some)
    assert asked == sorted([*2 * list(map(name, PLANS)), *map(name, PLANS[:3])])


def test_an_idle_actor_takes_what_a_slow_one_leaves(
    pool: Callable[..., RayPool], tmp_path: Path
) -> None:
    """The first chunk waits until the other actor has answered all the rest."""
    two = pool(2, {0: "wait"})

    def let_go() -> None:
        # 12 plans for two in chunks of 3, 2, 1, 1, ...: 7 of them after the first.
        while len(list(tmp_path.glob("call *"))) < 9:
            time.sleep(0.005)
        (tmp_path / "go").touch()

    thread = threading.Thread(target=let_go)
    thread.start()
    assert scored(two) == EXPECTED
    thread.join()
    assert sorted(map(len, calls(tmp_path).values())) == [1, 8]


def test_a_killed_actors_plans_are_scored_elsewhere(
    pool: Callable[..., RayPool], tmp_path: Path
) -> None:
    two = pool(2, {0: "wait"})
    before = {x.pid for x in two.processes}
    with killing(two, tmp_path) as killed:
        assert scored(two) == EXPECTED
    assert len(killed) == 1
    by_process = calls(tmp_path)
    again = [x for pid, x in by_process.items() if int(pid) != killed[0]]
    assert [name(None)] in [some for each in again for some in each]
    while len(two.processes) < 2:  # until the fresh one is there
        assert scored(two) == EXPECTED
    after = {x.pid for x in two.processes}
    assert after & before == before - {killed[0]}


def test_one_actor_alone_is_replaced(pool: Callable[..., RayPool]) -> None:
    one = pool(1, {4: "die once"})
    assert scored(one) == EXPECTED


def test_an_actor_that_dies_between_calls_is_replaced(pool: Callable[..., RayPool]) -> None:
    two = pool(2)
    os.kill(two.processes[0].pid, signal.SIGKILL)
    assert scored(two) == EXPECTED


@pytest.mark.parametrize("actors", [1, 2])
def test_a_plan_that_always_kills_is_named_and_the_pool_lives(
    actors: int, pool: Callable[..., RayPool], tmp_path: Path
) -> None:
    bad = make_plan(2)
    some = pool(actors, {PLANS.index(bad): "die"})
    for _ in range(3):  # more deaths than a place may have in a row, were they its own fault
        with pytest.raises(EngineError, match=f"plan {bad.digest}: 2 actors died while they ran"):
            scored(some)
    assert scored(some, [None]) == EXPECTED[:1]
    deaths = sum(bad.digest in plans[-1:][0] for plans in calls(tmp_path).values())
    assert deaths == 6


@pytest.mark.parametrize("actors", [1, 2])
def test_a_search_notes_such_a_plan_as_failed_and_goes_on(
    actors: int, pool: Callable[..., RayPool], tmp_path: Path
) -> None:
    bad = {2: "die", 7: "die", 9: "refuse"}
    some = pool(actors, bad)
    with open_folder(tmp_path / "search", {}) as journal:
        found = Evaluator(some, journal).score(Rows(), PLANS)
    for place, (result, expected) in enumerate(zip(found, EXPECTED, strict=True)):
        if place in bad:
            assert isinstance(result, Failure)
            assert name(PLANS[place]) in result.message
        else:
            assert result.tolist() == expected


def test_an_engines_own_refusal_is_passed_on_and_kills_nobody(
    pool: Callable[..., RayPool],
) -> None:
    two = pool(2, {3: "refuse"})
    before = two.processes
    with pytest.raises(EngineError, match=f"^plan {name(PLANS[3])}: found no room$"):
        scored(two)
    assert scored(two, PLANS[:3]) == EXPECTED[:3]
    assert two.processes == before


def test_a_bug_in_an_engine_is_an_engine_error(pool: Callable[..., RayPool]) -> None:
    two = pool(2, {3: "fail"})
    with pytest.raises(EngineError, match=r"actor \d \(.*\): ZeroDivisionError: a bug"):
        scored(two)


def test_a_full_model_that_kills_is_the_engines_fault(pool: Callable[..., RayPool]) -> None:
    two = pool(2, {0: "die"})
    with pytest.raises(EngineError, match="the full model: 2 actors died"):
        scored(two)


def test_without_restarts_the_pool_goes_on_with_fewer_then_says_who_is_left(
    pool: Callable[..., RayPool],
) -> None:
    two = pool(2, restarts=0)
    first, second = two.processes
    os.kill(first.pid, signal.SIGKILL)
    assert scored(two) == EXPECTED
    assert two.processes[-1] == second
    os.kill(second.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(EngineError) as caught:
            scored(two)
        for process in (first, second):
            assert f"({process}): The actor died unexpectedly" in str(caught.value)
        assert str(caught.value).startswith("no actor is left of 2: ")


def test_no_room_for_a_fresh_actor_does_not_wait_for_ever(
    pool: Callable[..., RayPool], cluster: None
) -> None:
    one = pool(1, cpus=4)
    one._place_seconds = 1.0
    taker = ray.remote(Taker).options(num_cpus=1).remote()  # waits for the first free CPU
    os.kill(one.processes[0].pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="since then there was no room for a fresh one"):
        scored(one)
    ray.kill(taker)


def test_too_many_actors_for_the_cluster_are_refused(pool: Callable[..., RayPool]) -> None:
    with pytest.raises(
        IncompatibleEnvironmentError,
        match=r"[12] of 2 actors found no room in 5 s: each needs \{'CPU': 3, 'GPU': 0\}; the "
        r"cluster has \{'CPU': 4.0, 'GPU': 0.0\}, free are",
    ):
        pool(2, cpus=3, place_seconds=5.0)


def test_other_versions_are_refused_by_name(
    pool: Callable[..., RayPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = pools.identity(model_path())
    old = {"torch": "1.0", f"checkpoint {model_path()}": "another"}
    monkeypatch.setattr(pools, "identity", lambda model: here | old)
    with pytest.raises(IncompatibleEnvironmentError) as caught:
        pool(1)
    for key, expected in old.items():
        assert f"{key} is {here[key]}, expected {expected}" in str(caught.value)
    assert "transformers" not in str(caught.value)
    assert f"actor 1 ({os.uname().nodename}, process " in str(caught.value)


def test_an_engine_that_does_not_start_is_named(pool: Callable[..., RayPool]) -> None:
    with pytest.raises(EngineError, match=r"actor \d \(.*\): no memory for the model"):
        pool(2, start="refuse")
    with pytest.raises(EngineError, match=r"did not start: The actor died unexpectedly"):
        pool(1, start="die", restarts=1)


def test_closing_ends_the_engines_and_their_processes(
    pool: Callable[..., RayPool], tmp_path: Path
) -> None:
    two = pool(2)
    processes = two.processes
    two.close()
    for process in processes:
        assert (tmp_path / f"closed {process.pid}").exists()
        wait_for_end(process.pid)
    with pytest.raises(EngineError, match="score: the pool is closed"):
        scored(two)


def test_an_interrupt_ends_the_actors(pool: Callable[..., RayPool], tmp_path: Path) -> None:
    two = pool(2, {0: "wait"})
    processes = two.processes

    def interrupt() -> None:
        while not list(tmp_path.glob("waiting *")):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        scored(two)
    thread.join()
    for process in processes:
        wait_for_end(process.pid)
    assert ray.is_initialized()  # it was there before the pool


def test_actors_compute_with_as_many_threads_as_asked(pool: Callable[..., RayPool]) -> None:
    two = pool(2, threads=3)
    for process in two.processes:
        assert psutil.Process(process.pid).environ()["OMP_NUM_THREADS"] == "3"


class Taker:
    """An actor that is in the way."""


class Rows:
    """As a ``RowSet``: the task scores with the engine it is given."""

    name = "train"
    rows = tuple(range(len(ROWS)))

    @property
    def task(self) -> Rows:
        return self

    def values(self, engine: Any, plans: Any, places: tuple[int, ...]) -> np.ndarray:
        rows = [ROWS[i] for i in places]
        return np.stack([x.logprobs for x in engine.score(plans, rows)])
