from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from liveprune.pruning.errors import EngineError, IncompatibleEnvironmentError, LiveprunError
from liveprune.server import admin_key, cli_live
from liveprune.server.operations import State
from tests.server.fake_control import KEY, FakeControl, admin_app, serving, view

app = typer.Typer()
cli_live.register(app)


@pytest.fixture
def control() -> FakeControl:
    experts = {"min": 3, "max": 8, "total": 16}
    e4 = view("e4", is_previous=True, experts=experts, row_bytes=1_500_000, in_flight=7)
    return FakeControl(known=[view("full"), e4])


@pytest.fixture(autouse=True)
def server(control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cli_live, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(cli_live.console, "width", 200)
    monkeypatch.setenv(admin_key.KEY_VARIABLE, KEY)
    monkeypatch.setenv(admin_key.STATE_VARIABLE, str(tmp_path / "client"))
    with serving(admin_app(control, tmp_path)) as url:
        monkeypatch.setenv("LIVEPRUNE_ADMIN_URL", url)
        yield


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def failure(*arguments: object) -> Exception:
    """The error that the main command would print, with exit status 2."""
    error = run(*arguments).exception
    assert isinstance(error, (LiveprunError, OSError))
    return error


def row(table: str, name: str) -> list[str]:
    line = next(line for line in table.splitlines() if name in line)
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_list_shows_each_variant() -> None:
    table = run("variants", "list").stdout
    assert row(table, "tiny:full") == ["tiny:full", "live", "*", "8", "2", "2.4 kB", "0"]
    assert row(table, "tiny:e4") == ["tiny:e4", "live", "previous", "3 to 8", "2", "1.5 MB", "7"]


def test_status_shows_memory_and_what_is_going_on(control: FakeControl) -> None:
    shown = run("status").stdout
    assert "tiny:full answers for tiny, ready" in shown
    assert "a roll-back returns to nothing" in shown
    assert row(shown, "KV cache") == ["KV cache (40 of 80 blocks)", "4.0 kB"]
    assert row(shown, "bound")[1] == "6.0 kB"
    # 1000 + 200 + 30 + 4000
    assert row(shown, "sum")[1] == "5.2 kB"
    assert row(shown, "tiny:e4")[1] == "live"
    run("rollback", "--no-wait")
    assert "under way: rollback tiny:full: queued" in run("status").stdout
    control.ready = False
    assert "NOT READY" in run("status").stdout


def test_scripts_get_json(control: FakeControl) -> None:
    assert json.loads(run("variants", "list", "--json").stdout) == [
        variant.to_json() for variant in control.known
    ]
    assert json.loads(run("status", "--json").stdout)["kv_blocks"] == 40
    operation = json.loads(run("swap", "e4", "--no-wait", "--json").stdout)
    assert operation == control.made[operation["id"]].to_json()
    assert json.loads(run("operations", "--json").stdout) == [operation]
    cancelled = json.loads(run("cancel", operation["id"], "--json").stdout)
    assert cancelled["state"] == "cancelled"


def test_a_swap_is_followed_to_its_end(control: FakeControl) -> None:
    control.steps = [State.FILLING, State.FILLING, State.DRAINING, State.DONE]
    result = run("swap", "e4", "--keep-previous")
    assert result.exit_code == 0
    assert result.stdout == "swap tiny:e4: done after 1.5 s\n"
    assert control.steps == []
    assert control.calls == [("swap", "e4", True, None)]


def test_the_last_line_says_what_was_freed_and_noted(control: FakeControl) -> None:
    control.steps = [State.DONE]

    def prepare() -> None:
        for operation in control.made.values():
            operation.freed_bytes = 2_000_000
            operation.notes = ["no golden tokens", "canary skipped"]

    original = control.operation

    def looked_at(operation_id: str) -> object:
        prepare()
        return original(operation_id)

    control.operation = looked_at  # type: ignore[method-assign, assignment]
    assert run("rollback").stdout == (
        "rollback tiny:full: done after 1.5 s, 2.0 MB freed; no golden tokens; canary skipped\n"
    )


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED])
def test_an_operation_that_does_not_succeed_is_exit_status_1(
    control: FakeControl, state: State
) -> None:
    control.steps = [State.FILLING, state]
    original = control.operation

    def looked_at(operation_id: str) -> object:
        control.made[operation_id].error = "3 of 8 golden answers differ"
        return original(operation_id)

    control.operation = looked_at  # type: ignore[method-assign, assignment]
    result = run("swap", "e4")
    assert result.exit_code == 1
    expected = f"swap tiny:e4: {state.value} after 1.5 s: 3 of 8 golden answers differ\n"
    assert result.stdout == expected
    control.steps = [state]
    result = run("rollback", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["state"] == state.value


def test_no_wait_returns_at_once(control: FakeControl) -> None:
    control.steps = [State.FILLING]
    result = run("swap", "tiny:e4", "--no-wait")
    (operation,) = control.made.values()
    assert result.stdout == (
        f"swap tiny:e4: queued, 0 bytes of 100 bytes (operation {operation.id})\n"
    )
    assert control.steps == [State.FILLING]


def test_ctrl_c_leaves_the_operation_running_and_says_so(
    control: FakeControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_live.time, "sleep", interrupt)
    result = run("swap", "e4")
    (operation,) = control.made.values()
    assert result.exit_code == 130
    assert operation.state is State.QUEUED
    assert "goes on in the server" in result.stderr
    assert f"liveprune cancel {operation.id}" in result.stderr
    assert result.stdout == ""


def test_add_sends_a_path_that_the_server_can_find(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "p.json").write_text("{}")
    (tmp_path / "q.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    control.steps = [State.DONE, State.DONE]
    # The first is here; the second is not, so the server looks in its own folder.
    for plan, found in (("p.json", tmp_path / "here" / "p.json"), ("q.json", tmp_path / "q.json")):
        result = run("variants", "add", plan, "--name", "e2")
        assert result.exit_code == 0
        assert control.calls[-1] == ("add", "e2", found, None)
    assert "add tiny:e2: done" in result.stdout


def test_remove_waits_like_the_others(control: FakeControl) -> None:
    control.steps = [State.DRAINING, State.DONE]
    assert run("variants", "remove", "e4").stdout == "remove tiny:e4: done after 1.5 s\n"
    assert control.calls == [("remove", "e4", None)]


def test_operations_are_listed_and_cancelled(
    control: FakeControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("swap", "e4", "--no-wait")
    (operation,) = control.made.values()
    shown = row(run("operations").stdout, operation.id)
    assert shown == [operation.id, "swap", "tiny:e4", "queued", "0 bytes", "", ""]
    operation.finished, operation.error = operation.created + 2, "no [red] room"
    assert row(run("operations").stdout, operation.id)[-2:] == ["2.0", "no [red] room"]
    monkeypatch.setattr(cli_live.console, "width", 60)
    assert operation.id in run("operations").stdout
    assert run("cancel", operation.id).stdout.startswith("swap tiny:e4: cancelled")


def test_errors_of_the_server_and_of_the_key_are_left_to_the_main_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(failure("swap", "nothing"), EngineError)
    assert "'nothing' is unknown" in str(failure("swap", "nothing"))
    (tmp_path / "key").write_text("wrong\n")
    (tmp_path / "key").chmod(0o600)
    refused = failure("status", "--admin-key-file", tmp_path / "key")
    assert f"from {tmp_path / 'key'}" in str(refused)
    monkeypatch.delenv(admin_key.KEY_VARIABLE)
    assert isinstance(failure("status"), IncompatibleEnvironmentError)
    assert "not reachable" in str(
        failure("status", "--admin-url", "http://127.0.0.1:9", "--admin-key-file", tmp_path / "key")
    )


def test_the_key_in_the_state_folder_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(admin_key.KEY_VARIABLE)
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "admin.key").write_text(KEY + "\n")
    (tmp_path / "client" / "admin.key").chmod(0o600)
    assert run("variants", "list").exit_code == 0
