from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.plan_io import save_plan
from liveprune.server.rebuild_worker import CheckpointWorker
from tests.checkpoints import make_plan, merge_plan

FOUR = [(0, 3, 4, 6)]


@pytest.fixture
def base(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("mixtral")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_it_writes_what_apply_writes(base: Path, tmp_path: Path) -> None:
    plan = merge_plan(base, 3, router_map=True)
    reports: list[tuple[int, int]] = []
    CheckpointWorker(base, plan, tmp_path / "rebuilt" / "out").run(
        lambda done, total: reports.append((done, total))
    )
    apply_plan(base, plan, tmp_path / "expected")
    assert contents(tmp_path / "rebuilt" / "out") == contents(tmp_path / "expected")
    assert [path.name for path in (tmp_path / "rebuilt").iterdir()] == ["out"]
    assert reports == sorted(reports)
    assert reports[-1][0] == reports[-1][1] > 0


def test_what_goes_wrong_in_it_is_said_here(base: Path, tmp_path: Path) -> None:
    other = make_plan(base, [(0, 3, 4, 6)] * 3, top_k=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "taken").touch()
    with pytest.raises(CheckpointError, match=r"not written: .*exists already"):
        CheckpointWorker(base, other, tmp_path / "out").run(lambda *_: None)


def test_killed_it_leaves_nothing(base: Path, tmp_path: Path) -> None:
    worker = CheckpointWorker(base, make_plan(base, FOUR), tmp_path / "out")
    (tmp_path / ".out.partial").mkdir()  # as apply_plan names what it works on
    started = threading.Event()

    def kill() -> None:
        while worker._process is None:
            time.sleep(0.001)
        started.set()
        worker.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(CheckpointError, match="the worker ended with status -9"):
        worker.run(lambda *_: None)
    killer.join()
    assert started.is_set()
    assert list(tmp_path.iterdir()) == []


def test_killed_before_it_began_it_does_not_begin(base: Path, tmp_path: Path) -> None:
    worker = CheckpointWorker(base, make_plan(base, FOUR), tmp_path / "out")
    worker.kill()
    with pytest.raises(CheckpointError, match="cancelled"):
        worker.run(lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_without_a_server_it_gives_up(base: Path, tmp_path: Path) -> None:
    save_plan(make_plan(base, FOUR), tmp_path / "plan.json")
    command = [sys.executable, "-m", "liveprune.server.rebuild_worker"]
    command += [str(base), str(tmp_path / "plan.json"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()  # as when the server is killed
        assert process.wait(120) != 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
