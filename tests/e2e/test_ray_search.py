"""Searches over two real engines in actors of Ray, one of them killed: as with one engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from liveprune.pruning.demo import model_path, rows_path
from liveprune.pruning.evaluation.engine import Engine
from liveprune.pruning.evaluation.task import load_task
from liveprune.pruning.evaluation.transformers_engine import TransformersEngine
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan_io import load_plan
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.result import SearchResult
from liveprune.pruning.search.run import search
from liveprune.server.engine_description import EngineDescription
from liveprune.server.ray_pool import RayPool, ray_pool
from tests.e2e.engine import ENVIRONMENT, PLUGINS

ROWS, KILLED_AFTER = 16, 4
SETTINGS = Settings(inits=6, prune_candidates=14, merge_candidates=10, children=4, racing=False)
TITLE = "ray::EngineActor"
"""What Ray names the processes of our actors."""


def run_search(engine: Engine, folder: Path) -> SearchResult:
    """Fitness is a real number of the model's: the last bit would show."""
    model = model_path()
    task = load_task(
        rows_path("add", "train"), model, measure="nll", max_rows=ROWS, max_answer_tokens=6
    )
    return search(
        model,
        ModelSpec.from_path(model),
        engine,
        train=task,
        folder=folder,
        experts=4,
        top_k=1,
        settings=SETTINGS,
    )


def lines(journal: Path) -> list[dict[str, Any]]:
    """Requests and answers, without the time that they took."""
    found = [json.loads(line) for line in journal.read_text().splitlines()]
    return [
        {key: value for key, value in entry.items() if not key.endswith("_seconds")}
        for entry in found
    ]


@contextmanager
def killing_one(pool: RayPool, journal: Path) -> Iterator[list[int]]:
    """Kill an actor at work, once the journal has a few lines."""
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        wait_for_lines(journal, ended.is_set)
        killed.append(kill_busy([process.pid for process in pool.processes], ended.is_set))

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


def wait_for_lines(journal: Path, ended: Callable[[], object]) -> None:
    while not journal.exists() or journal.read_bytes().count(b"\n") < KILLED_AFTER:
        assert not ended(), "it ended before it could be killed"
        time.sleep(0.005)


def kill_busy(pids: list[int], ended: Callable[[], object]) -> int:
    while True:
        assert not ended(), "it ended before it could be killed"
        for pid in pids:
            if psutil.Process(pid).cmdline()[0] == f"{TITLE}.ask":
                os.kill(pid, signal.SIGKILL)
                return pid
        time.sleep(0.001)


def test_with_an_actor_killed_the_search_is_bit_for_bit_that_of_one_engine(tmp_path: Path) -> None:
    alone = run_search(TransformersEngine(model_path()), tmp_path / "alone")
    described = EngineDescription("transformers", model_path(), "float32", longest=64)
    with (
        ray_pool(described, 2, None) as pool,
        killing_one(pool, tmp_path / "pool" / "journal.jsonl") as killed,
    ):
        before = {process.pid for process in pool.processes}
        result = run_search(pool, tmp_path / "pool")
        after = {process.pid for process in pool.processes}
    assert len(before) == 2
    assert killed[0] in before - after
    assert after & before == before - {killed[0]}
    assert lines(tmp_path / "pool" / "journal.jsonl") == lines(tmp_path / "alone" / "journal.jsonl")
    assert result.plan == alone.plan
    assert [stage.scores for stage in result.stages] == [stage.scores for stage in alone.stages]


def command(output: Path, *more: str) -> list[str]:
    data = [arg for s in ("train", "dev") for arg in (f"--{s}", str(rows_path("add", s)))]
    return [
        *(sys.executable, "-m", "liveprune.server", "prune", str(model_path()), "--method", "eep"),
        *("-o", str(output), "--experts", "4", "--top-k", "1", *data, "--max-rows", str(ROWS)),
        *("--max-answer-tokens", "12", "--dtype", "float32", "--set", "racing=false"),
        *("--set", "inits=6", "--set", "prune_candidates=20", "--set", "merge_candidates=20"),
        *("--set", "children=4", *more),
    ]


def environment() -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key != PLUGINS}
    return inherited | ENVIRONMENT


def run(output: Path, *more: str) -> None:
    done = subprocess.run(
        command(output, *more), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def journal_of(output: Path) -> Path:
    return output.with_name(output.name + ".search") / "journal.jsonl"


@contextmanager
def started(output: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The command, in a group of its own, as a shell would start it."""
    with subprocess.Popen(
        command(output, *more),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            wait_for_lines(journal_of(output), child.poll)
            yield child
        finally:
            child.kill()


def family(child: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(child.pid).children(recursive=True)


def actors(child: subprocess.Popen[str]) -> list[int]:
    found = []
    for process in family(child):
        with suppress(psutil.NoSuchProcess, IndexError):
            if process.cmdline()[0].startswith(TITLE):
                found.append(process.pid)
    return found


def check_ended(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []


def test_interrupted_like_in_a_shell_it_goes_on_with_other_actors_or_none(tmp_path: Path) -> None:
    run(tmp_path / "alone", "--engine", "transformers")
    pruned = tmp_path / "pruned"
    with started(pruned, "--engine", "transformers", "--actors", "2") as child:
        processes = family(child)
        assert len(actors(child)) == 2
        os.killpg(child.pid, signal.SIGINT)  # what Ctrl-C does: to the actors, too
        _, errors = child.communicate(timeout=300)
    assert child.returncode == 2
    assert "cancelled; run it again with the same arguments" in errors
    assert "is replaced" not in errors
    check_ended(processes)
    kept = lines(journal_of(pruned))
    run(pruned, "--engine", "transformers")
    assert lines(journal_of(pruned))[: len(kept)] == kept
    assert lines(journal_of(pruned)) == lines(journal_of(tmp_path / "alone"))
    assert load_plan(pruned) == load_plan(tmp_path / "alone")


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_vllm_in_actors_of_which_one_is_killed(tmp_path: Path) -> None:
    run(tmp_path / "alone", "--engine", "vllm")
    pruned = tmp_path / "pruned"
    with started(pruned, "--engine", "vllm", "--actors", "2") as child:
        processes = family(child)
        killed = kill_busy(actors(child), child.poll)
        _, errors = child.communicate(timeout=900)
    assert child.returncode == 0, errors[-4000:]
    assert f"process {killed}) is replaced (1)" in errors
    check_ended(processes)
    assert lines(journal_of(pruned)) == lines(journal_of(tmp_path / "alone"))
    assert load_plan(pruned) == load_plan(tmp_path / "alone")
