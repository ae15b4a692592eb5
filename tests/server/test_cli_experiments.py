from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from liveprune.pruning.errors import EngineError, LiveprunError
from liveprune.server import admin_key, cli_experiments, cli_live
from liveprune.server.admin_client import AdminConflictError
from liveprune.server.cli_experiment_form import definition_of, parse_weights
from tests.server.experiment_world import DEFINITION, definition
from tests.server.fake_control import KEY, serving
from tests.server.test_admin_experiments import Api

app = typer.Typer()
cli_live.register(app)
cli_experiments.register(app)
SHORT = (
    *("--name", "halve", "--arm", "full=0.9", "--arm", "pruned:e4=0.1"),
    *("--primary", "e2e_seconds:p95", "--guardrail", "loop:0.01"),
)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    made = Api(tmp_path)
    yield made
    made.site.store.close()


@pytest.fixture(autouse=True)
def server(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cli_live.console, "width", 250)
    monkeypatch.setenv(admin_key.KEY_VARIABLE, KEY)
    monkeypatch.setenv(admin_key.STATE_VARIABLE, str(tmp_path / "client"))
    with serving(api.app) as url:
        monkeypatch.setenv("LIVEPRUNE_ADMIN_URL", url)
        yield


def run(*arguments: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text)


def done(*arguments: object, text: str | None = None) -> str:
    result = run(*arguments, text=text)
    assert result.exit_code == 0, result.exception
    return result.stdout


def failure(*arguments: object, text: str | None = None) -> str:
    error = run(*arguments, text=text).exception
    assert isinstance(error, (LiveprunError, OSError))
    return str(error)


def row(table: str, name: str) -> list[str]:
    line = next(line for line in table.splitlines() if f"│ {name}" in line)
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_short_form() -> None:
    found = json.loads(done("experiments", "start", *SHORT, "--json"))["definition"]
    assert found["arms"] == [
        {"name": "full", "variant": "full", "weight": 0.9, "shadow": False},
        {"name": "pruned", "variant": "e4", "weight": 0.1, "shadow": False},
    ]
    assert (found["control"], found["primary"]["statistic"]) == ("full", "p95")
    (guardrail,) = found["guardrails"]
    assert (guardrail["metric"], guardrail["margin"], guardrail["relative"]) == (
        "loop",
        0.01,
        False,
    )


def test_every_option_of_the_short_form() -> None:
    found = json.loads(
        done(
            *("experiments", "check", *SHORT, "--control", "pruned", "--ramp", "0.95,1"),
            *("--guardrail", "e2e_seconds:p99:5%", "--action", "rollback", "--action", "ramp"),
            *("--set", "alpha=0.01", "--set", 'unit=["api-key", "request-id"]', "--dry-run"),
        )
    )
    assert (found["control"], found["ramp"], found["dry_run"]) == ("pruned", [0.95, 1.0], True)
    assert (found["alpha"], found["unit"]) == (0.01, ["api-key", "request-id"])
    assert found["actions"] == ["rollback", "ramp"]
    last = found["guardrails"][1]
    assert (last["statistic"], last["margin"], last["relative"]) == ("p99", 0.05, True)
    assert json.loads(done("experiments", "list", "--json")) == [], "only checked"


def test_a_file_and_standard_input(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps(definition()))
    found = json.loads(done("experiments", "check", tmp_path / "e.json", "--set", "alpha=0.02"))
    assert (found["name"], found["alpha"]) == ("halve", 0.02)
    found = json.loads(done("experiments", "start", "-", "--json", text=json.dumps(DEFINITION)))
    assert found["state"] == "running"
    assert "not readable as JSON" in failure("experiments", "start", "-", text="{")
    assert "found list, expected a JSON object" in failure("experiments", "start", "-", text="[]")
    assert "none.json" in failure("experiments", "start", tmp_path / "none.json")
    assert "found no definition" in failure("experiments", "start")


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("arms", "e4", r"--arm: found 'e4', expected \[NAME:\]TAG=SHARE"),
        ("arms", "a:=0.1", "--arm: found 'a:=0.1'"),
        ("arms", "e4=many", "--arm: found 'many', expected a number"),
        ("guardrails", "loop", "--guardrail: found 'loop', expected METRIC:MARGIN"),
        ("guardrails", "loop:", "found '', expected a number"),
        ("primary", "e2e_seconds:", r"--primary: found 'e2e_seconds:', expected METRIC"),
        ("ramp", "0.1,,", "--ramp: found '', expected a number"),
        ("changes", "alpha", "--set: found 'alpha'"),
    ],
)
def test_malformed_options(option: str, text: str, message: str) -> None:
    fields: dict[str, Any] = dict.fromkeys(
        ("name", "arms", "control", "primary", "guardrails", "actions", "ramp", "changes")
    )
    fields[option] = text if option in ("primary", "ramp") else [text]
    with pytest.raises(LiveprunError, match=message):
        definition_of({}, dry_run=False, **fields)


def test_weights_are_parsed() -> None:
    assert parse_weights(["full=0.5", "x=0.25"]) == {"full": 0.5, "x": 0.25}
    for bad in (["full"], ["=1"], ["a=1", "a=2"], ["a=x"]):
        with pytest.raises(LiveprunError, match="weights: found"):
            parse_weights(bad)


def test_show_says_all_that_matters(api: Api) -> None:
    done("experiments", "start", "-", text=json.dumps(definition(dry_run=True)))
    assert "no decision yet" in done("experiments", "show", "halve")
    arms = list(api.site.serve(300, loops={"pruned": 0.6}).values())
    asyncio.run(api.site.look())
    shown = done("experiments", "show", "halve")
    assert "experiment halve on tiny: running (dry run)" in shown
    count = str(arms.count("pruned"))
    assert row(shown, "pruned ")[:5] == ["pruned", "e4", "50%", count, count]
    assert row(shown, "full ")[1:3] == ["full", "50%"]
    assert row(shown, "control")[0] == "control"
    finding = next(x for x in shown.splitlines() if "loop" in x and "│" in x)
    assert "worse" in finding
    assert " to unbounded" not in finding
    assert "ROLLBACK pruned (decision 1," in shown
    assert "  loop: worse" in shown
    assert "withheld: notify, rollback" in shown
    assert "mismatch of shares: p = 1" in shown
    found = json.loads(done("experiments", "show", "halve", "--json"))
    assert found["decision"]["verdict"] == "ROLLBACK"
    listed = row(done("experiments", "list"), "halve")
    assert listed[1:4] == ["tiny", "running", "full 50%, pruned 50%"]
    assert listed[5] == "ROLLBACK"
    table = row(done("experiments", "decisions", "halve"), "1")
    assert table[2:5] == ["ROLLBACK", "pruned", "(notify withheld), (rollback withheld)"]
    assert json.loads(done("experiments", "decisions", "halve", "--json"))[0]["id"] == 1
    whole = json.loads(done("experiments", "decisions", "halve", "--id", "1"))
    assert whole["record"]["experiment"]["name"] == "halve"


def test_weights_stop_and_feedback(api: Api) -> None:
    done("experiments", "start", "-", text=json.dumps(DEFINITION))
    arms = api.site.serve(2)
    found = done("experiments", "feedback", "id-1", "0.5")
    assert found == f"counted for arm {arms['user-1']} of experiment halve\n"
    found = json.loads(done("experiments", "feedback", "id-0", "1", "--json"))
    assert found == {"experiment": "halve", "arm": arms["user-0"]}
    assert "answer 'id-0': found none" in failure("experiments", "feedback", "id-0", "1")
    shown = done("experiments", "weights", "halve", "full=0.25", "pruned=0.75")
    assert row(shown, "pruned")[2] == "75%"
    shown = done("experiments", "stop", "halve", "--reason", "enough")
    assert "halve on tiny: stopped" in shown
    assert "ended because: enough" in shown
    again = run("experiments", "stop", "halve").exception
    assert isinstance(again, AdminConflictError)
    assert "has ended: stopped" in str(again)


def test_status_has_a_line_for_each_that_runs(api: Api) -> None:
    for name, traffic in (("a", [0, 0.5]), ("b", [0.5, 1])):
        text = json.dumps(definition(name=name, traffic=traffic))
        done("experiments", "start", "-", text=text)
    done("experiments", "stop", "b")
    line = "experiment a: running, no decision yet: full 50% (0 units), pruned 50% (0 units)"
    shown = done("status")
    assert line in shown
    assert "experiment b" not in shown
    api.site.live.paused["a"] = "not live here: e4"
    assert f"{line}; not routed here: not live here: e4" in done("status")
    assert "NOT ROUTED HERE: not live here: e4" in done("experiments", "show", "a")
    assert "experiments" not in json.loads(done("status", "--json"))


def test_errors_are_left_to_the_main_command() -> None:
    assert "'none': found none of this name" in failure("experiments", "show", "none")
    error = run("experiments", "start", "-", text=json.dumps(definition(alpha=9))).exception
    assert isinstance(error, EngineError)
    assert "alpha: found 9" in str(error)
