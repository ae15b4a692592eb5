from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.server.cli import app
from liveprune.server.live_options import model_state
from liveprune.server.state_folder import StateFolder
from tests.server.fake_engine import fake_plan

A = fake_plan([0, 1])


@pytest.fixture
def base(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("mixtral")


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> StateFolder:
    """A closed one that knows a variant."""
    path = model_state(tmp_path / "state", base)
    opened = StateFolder(path, base, model=fingerprint_model(base))
    opened.store_plan(A)
    opened.save(type(opened.state)({"a": A.digest}, ("full",), "full", None, 1))
    opened.close()
    return opened


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Callable[..., Any]:
    def call(command: str, *arguments: object, state: str = "state") -> Any:
        words = ["store", command, str(base), *map(str, arguments)]
        return CliRunner().invoke(app, [*words, "--state-dir", str(tmp_path / state)])

    return call


def test_check(folder: StateFolder, run: Callable[..., Any]) -> None:
    found = run("check")
    assert (found.exit_code, found.stdout) == (0, "1 variants, 0 jobs, 0 findings\n")
    left = fake_plan([3])
    folder.store.plans.save(left)
    assert run("check").exit_code == 0  # it is only in the way
    found = run("check", "--repair")
    assert found.stdout.startswith(f"deleted {left.digest}.json\n1 variants")
    folder.store.plans.discard(A.digest)
    found = run("check")
    assert found.exit_code == 1
    assert "variant a: " in found.stdout


def test_repair_waits_for_no_server(
    folder: StateFolder, base: Path, run: Callable[..., Any]
) -> None:
    server = StateFolder(folder.path, base, model=folder.store.model)
    assert run("check").exit_code == 0
    found = run("check", "--repair")
    assert "used by another server" in str(found.exception)
    server.close()


def test_export(folder: StateFolder, run: Callable[..., Any]) -> None:
    form = json.loads(run("export").stdout)
    assert [(x["tag"], x["digest"]) for x in form["variants"]] == [("a", A.digest)]
    assert form["servers"][0]["state"]["alias"] == "full"


def test_backup_and_restore(
    folder: StateFolder, base: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    backup = tmp_path / "backup.tar"
    assert run("backup", "-o", backup).exit_code == 0
    assert "exists already" in str(run("backup", "-o", backup).exception)
    found = run("restore", backup, state="new")
    assert found.stdout == "restored 1 variants\n"
    assert run("check", state="new").exit_code == 0
    again = StateFolder(model_state(tmp_path / "new", base), base, model=folder.store.model)
    assert again.state.variants == {"a": A.digest}
    again.close()


def test_a_state_folder_that_is_not_there(run: Callable[..., Any], tmp_path: Path) -> None:
    found = run("check")
    assert "found no store.db, expected a server's state folder" in str(found.exception)
    assert not (tmp_path / "state").exists()
