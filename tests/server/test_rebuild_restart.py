"""A real process restarts itself, fails to, and is killed; see ``rebuild_child``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from liveprune.pruning.errors import CheckpointError
from liveprune.server.operations import Operation, State
from liveprune.server.rebuild_restart import (
    VARIABLE,
    Command,
    next_model,
    restart_wanted,
    restarting,
)
from liveprune.server.rebuild_state import Built, RebuildFolder, RebuildState

CHILD = Path(__file__).with_name("rebuild_child.py")
SMALL = Built("5" * 32, {"min": 4, "max": 4, "total": 12}, {"min": 1, "max": 1}, 1000)


@dataclass
class Place:
    """A state folder with the checkpoint of ``small``, and the base model beside it."""

    path: Path

    def folder(self) -> RebuildFolder:
        return RebuildFolder(self.path / "state", self.path / "base")

    def run(self, fate: str) -> tuple[int, list[dict[str, Any]]]:
        """Exit status of the child, and its starts."""
        log = self.path / "log"
        command = [sys.executable, str(CHILD), str(self.path / "state"), str(self.path / "base")]
        environment = {**os.environ, "A_VARIABLE": "as given"}
        log.unlink(missing_ok=True)
        command += [str(log), fate]
        done = subprocess.run(command, env=environment, timeout=300, check=False)
        return done.returncode, [json.loads(line) for line in log.read_text().splitlines()]

    def operation(self) -> Operation:
        operation = self.folder().state.last_operation()
        assert operation is not None
        return operation


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    place = Place(tmp_path)
    (tmp_path / "state").mkdir()
    place.folder().update(lambda _: RebuildState(variants={"small": SMALL}))
    (tmp_path / "state" / "rebuilt" / SMALL.digest).mkdir(parents=True)
    return place


@pytest.mark.parametrize("fate", ["success", "error-while-stopping", "exit-while-stopping"])
def test_a_swap_restarts_the_same_process(fate: str, place: Place) -> None:
    status, starts = place.run(fate)
    assert status == 0
    assert [start["model"] for start in starts] == ["base", SMALL.digest]
    assert [start["attempt"] for start in starts] == [False, True]
    assert len({start["pid"] for start in starts}) == 1
    assert [start["variable"] for start in starts] == ["as given", "as given"]
    operation = place.operation()
    assert operation.state is State.DONE
    assert operation.seconds["switching"] > 0
    assert (place.folder().state.serving, place.folder().state.previous) == ("small", "full")
    _, later = place.run("no-swap")
    assert [start["model"] for start in later] == [SMALL.digest]


@pytest.mark.parametrize(
    ("fate", "reason"),
    [
        ("error", "the server ended before it answered: RuntimeError: no room on this device;"),
        ("bad-exit", "the server ended before it answered: SystemExit: 3"),
        ("hang", "the server did not answer within 1 s"),
    ],
)
def test_a_start_that_fails_lets_the_old_variant_serve_again(
    fate: str, reason: str, place: Place
) -> None:
    status, starts = place.run(fate)
    assert status == 0
    assert [start["model"] for start in starts] == ["base", SMALL.digest, "base"]
    assert len({start["pid"] for start in starts}) == 1
    operation = place.operation()
    assert operation.state is State.FAILED
    assert reason in operation.error
    state = place.folder().state
    assert (state.serving, state.previous, state.wanted) == ("full", None, None)
    if fate == "hang":
        assert not psutil.pid_exists(int((place.path / "engine").read_text()))


@pytest.mark.parametrize(
    ("fate", "starts_before", "reason"),
    [
        ("killed-before-restart", 1, "was killed before it was restarted with 'small'"),
        ("killed-before-answer", 2, "the server with 'small' was killed before it answered"),
    ],
)
def test_killed_before_it_answers_what_answered_last_serves_again(
    fate: str, starts_before: int, reason: str, place: Place
) -> None:
    status, starts = place.run(fate)
    assert status == -signal.SIGKILL
    assert len(starts) == starts_before
    assert not place.operation().state.ended
    status, starts = place.run("no-swap")
    assert status == 0
    assert [start["model"] for start in starts] == ["base"]
    assert place.operation().state is State.FAILED
    assert reason in place.operation().error


def test_killed_after_it_has_answered_it_serves_again(place: Place) -> None:
    status, starts = place.run("killed-after-answer")
    assert (status, len(starts)) == (-signal.SIGKILL, 2)
    status, starts = place.run("no-swap")
    assert [start["model"] for start in starts] == [SMALL.digest]
    assert place.operation().state is State.DONE


@pytest.mark.parametrize("fate", ["stopped", "interrupted-while-stopping"])
def test_an_operator_who_stops_the_server_has_it_stopped(fate: str, place: Place) -> None:
    _, starts = place.run(fate)
    assert starts[-1]["model"] == (SMALL.digest if fate == "stopped" else "base")
    assert len(starts) == (2 if fate == "stopped" else 1)
    _, starts = place.run("no-swap")
    assert [start["model"] for start in starts] == ["base"]
    assert place.operation().state is State.FAILED


def swapping(state: RebuildState) -> RebuildState:
    return state.switching("small", Operation("swap", "m:small", id="the-id"), None)


def test_a_checkpoint_that_is_gone_is_not_tried(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.folder()
    folder.update(swapping)
    monkeypatch.setenv(VARIABLE, "the-id")
    (place.path / "state" / "rebuilt" / SMALL.digest).rmdir()
    assert next_model(folder) == place.path / "base"
    assert VARIABLE not in os.environ
    assert "the checkpoint is gone" in place.operation().error


def test_without_what_answered_last_nothing_else_is_served(place: Place) -> None:
    folder = place.folder()
    folder.update(lambda _: RebuildState(variants={"small": SMALL}, serving="small"))
    (place.path / "state" / "rebuilt" / SMALL.digest).rmdir()
    with pytest.raises(CheckpointError, match="of the variant 'small', which answered last, is"):
        next_model(folder)


def test_a_full_disk_keeps_nobody_from_serving(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.folder()
    folder.update(swapping)
    monkeypatch.setenv(VARIABLE, "the-id")

    def update(_: Callable[[RebuildState], RebuildState]) -> RebuildState:
        raise OSError("no space left on device")

    monkeypatch.setattr(folder, "update", update)
    assert next_model(folder) == place.path / "base"
    assert folder.state.wanted is None
    assert "no space left on device" in str((folder.state.operation or {})["error"])


def test_nothing_wanted_no_restart(place: Place) -> None:
    folder = place.folder()
    assert not restart_wanted(folder)
    assert not restart_wanted(folder, RuntimeError("the engine died"))
    folder.update(lambda now: swapping(now).attempting())
    folder.answering.set()
    assert not restart_wanted(folder, RuntimeError("the engine died later"))
    with pytest.raises(RuntimeError, match="an error"), restarting(place.folder()):
        raise RuntimeError("an error")


def test_the_command_line_is_the_one_that_python_got() -> None:
    command = Command.of_this_process()
    assert command.program == command.arguments[0] == sys.executable
    assert command.arguments[1:] == tuple(sys.orig_argv[1:])


def test_children_end_even_those_that_do_not_want_to() -> None:
    # In a process of its own: this one may have children that other tests need.
    program = """
import subprocess, sys
from liveprune.server.rebuild_restart import end_children
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); "
willing = subprocess.Popen(["sleep", "600"])
other = subprocess.Popen([sys.executable, "-c", stubborn + "time.sleep(600)"], stdout=-1)
other.stdout.readline()
end_children(seconds=0.2)
print(willing.pid, other.pid)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    willing, other = map(int, done.stdout.split())
    assert not psutil.pid_exists(willing)
    assert not psutil.pid_exists(other)
