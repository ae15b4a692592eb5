from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.errors import CheckpointError, VariantError
from liveprune.server.operations import Operation, State
from liveprune.server.rebuild_state import Built, RebuildFolder, RebuildState

SMALL = Built("0" * 32, {"min": 4, "max": 4, "total": 12}, {"min": 1, "max": 1}, 1000)
TINY = Built("1" * 32, {"min": 2, "max": 2, "total": 6}, {"min": 1, "max": 1}, 500)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def swapping(**changes: Any) -> RebuildState:
    state = RebuildState(variants={"small": SMALL, "tiny": TINY}, **changes)
    operation = Operation("swap", "m:small", state=State.SWITCHING, notes=["a note"])
    return state.switching("small", operation, "a-key")


def test_what_is_saved_is_read_again(tmp_path: Path, base: Path) -> None:
    folder = RebuildFolder(tmp_path, base)
    assert folder.state == RebuildState()
    saved = folder.update(lambda _: swapping(previous="tiny"))
    again = RebuildFolder(tmp_path, base)
    assert again.state == saved
    assert again.model("small") == tmp_path / "rebuilt" / SMALL.digest
    assert again.model("full") == base
    with pytest.raises(VariantError, match=r"'none' is unknown, expected one of full, small, tiny"):
        again.model("none")


def test_an_attempt_that_answers_becomes_what_serves() -> None:
    before = time.time()
    state = swapping(serving="tiny").attempting().answered(2.5)
    assert (state.serving, state.previous, state.wanted) == ("small", "tiny", None)
    assert (state.attempt, state.start_seconds) == (False, 2.5)
    operation = state.last_operation()
    assert operation is not None
    assert operation.state is State.DONE
    assert operation.finished is not None
    assert operation.finished >= before
    assert 0 <= operation.seconds["switching"] < 60
    assert operation.notes[0] == "a note"
    assert "'small' answered 0." in operation.notes[1]


def test_a_failed_attempt_leaves_what_served() -> None:
    state = swapping(serving="tiny", previous="full").attempting().failed("no room")
    assert (state.serving, state.previous, state.wanted) == ("tiny", "full", None)
    assert not state.attempt
    running = state.last_operation()
    assert running is not None
    assert not running.state.ended  # until something answers
    ended = state.answered(1.0).last_operation()
    assert ended is not None
    assert (ended.state, ended.error) == (State.FAILED, "no room")
    assert "'tiny' answered" in ended.notes[-1]


def test_an_ended_operation_stays_as_it_was() -> None:
    state = swapping().attempting().answered(1.0)
    assert state.answered(2.0).operation == state.operation


def test_a_swap_that_could_not_stop_the_server_never_was() -> None:
    assert swapping().staying().answered(1.0).last_operation() is None


def test_the_old_state_stays_if_writing_fails(tmp_path: Path, base: Path) -> None:
    folder = RebuildFolder(tmp_path, base)
    folder.state_file.mkdir()
    with pytest.raises(OSError, match="directory"):
        folder.update(lambda _: swapping())
    assert folder.state == RebuildState()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version is 2; this release reads 1"),
        ({"base": {"model": "/other"}}, "holds the variants of the base model"),
        ({"serving": "none"}, "damaged: ValueError: found 'none', expected the tag of a variant"),
        ({"unknown": 1}, "damaged: TypeError"),
        ({"variants": {"small": {"digest": "x"}}}, "damaged: TypeError"),
        (
            {"variants": {"small": {"digest": "../x", "experts": {}, "top_k": {}, "bytes": 1}}},
            r"damaged: ValueError: found '\.\./x', expected a plan digest",
        ),
        ({"operation": {"id": "1"}}, "damaged: KeyError"),
    ],
)
def test_what_is_not_understood_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, base: Path
) -> None:
    folder = RebuildFolder(tmp_path, base)
    folder.update(lambda now: now)
    form = json.loads(folder.state_file.read_text())
    folder.state_file.write_text(json.dumps({**form, **change}))
    with pytest.raises(CheckpointError, match=message):
        RebuildFolder(tmp_path, base)


def test_half_a_file_is_refused(tmp_path: Path, base: Path) -> None:
    (tmp_path / "rebuild.json").write_text('{"version": 1')
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        RebuildFolder(tmp_path, base)
