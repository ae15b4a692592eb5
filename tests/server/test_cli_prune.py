from __future__ import annotations

import html
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from liveprune.pruning.demo import model_path, rows_path
from liveprune.pruning.errors import (
    DataError,
    EngineError,
    IncompatibleEnvironmentError,
    LiveprunError,
    PlanError,
)
from liveprune.pruning.evaluation import transformers_engine
from liveprune.pruning.plan_io import CHECKPOINT_PLAN, load_plan
from liveprune.pruning.search.presets import PRESETS, Settings
from liveprune.server import engine_description
from liveprune.server.cli import app
from liveprune.server.engine_description import EngineDescription
from liveprune.server.search_options import parse_settings

DEMO = model_path()
TRAIN, DEV, TEST = (rows_path("add", split) for split in ("train", "dev", "test"))
SEARCH = (
    *("prune", DEMO, "--method", "eep", "--experts", "4", "--train", TRAIN, "--max-rows", "8"),
    *("--engine", "transformers", "--max-answer-tokens", "8", "--seed", "3"),
    *("--set", "inits=3", "--set", "prune_candidates=4", "--set", "merge_candidates=3"),
    *("--set", "children=2", "--set", "racing=false"),
)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_search_ends_in_a_checkpoint_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pruned"
    monkeypatch.setattr("sys.argv", ["/bin/liveprune", "prune", "a model", "--method", "eep"])
    shown = run(*SEARCH, "-o", out, "--top-k", "1", "--dev", DEV, "--test", TEST)
    folder = tmp_path / "pruned.search"
    report = json.loads((folder / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["prune", "merge"]
    assert report["data"]["test"]["rows"] == 8
    assert [point["stage"] for point in report["curve"]] == ["prune"] * 4 + ["merge"] * 3
    assert report["parameters"]["engine"] == "transformers, bfloat16"
    page = (folder / "report.html").read_text()
    assert "<html" in page
    assert report["command"] == "liveprune prune 'a model' --method eep"
    assert "liveprune prune 'a model' --method eep" in html.unescape(page)
    plan = load_plan(out / CHECKPOINT_PLAN)
    assert plan == load_plan(folder / "merge.plan.json")
    assert plan.lineage.method == "eep"
    assert [(x.kept_experts, x.top_k) for x in plan.layers] == [(4, 1)] * 4
    pruned = load_plan(folder / "prune.plan.json")
    assert all(len(layer.kept) == 4 for layer in pruned.layers)
    for words in ("full model", "prune", "merge", "test (8", "rows)", f"plan {plan.digest}"):
        assert words in shown


def test_the_same_command_goes_on_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(*SEARCH, "-o", tmp_path / "a.json", "--plan-only", "--search-dir", tmp_path / "s")

    def score(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(transformers_engine.TransformersEngine, "score", score)
    again = run(*SEARCH, "-o", tmp_path / "b.json", "--plan-only", "--search-dir", tmp_path / "s")
    assert again.replace("b.json", "a.json") == first
    assert load_plan(tmp_path / "a.json") == load_plan(tmp_path / "b.json")


def test_another_search_does_not_share_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    run(*SEARCH, "-o", tmp_path / "a.json", "--plan-only", "--search-dir", folder)
    with pytest.raises(DataError, match="seed"):
        run(*SEARCH, "-o", tmp_path / "b", "--search-dir", folder, "--seed", "4")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "eep", "--experts", "4"], "--train: missing, expected for method eep"),
        (["--method", "eep", "--train", TRAIN], "--experts: missing"),
        (["--method", "eep", "--tau", "1"], "--tau: found with method eep"),
        (["--method", "reap", "--train", TRAIN], "--train: found with method reap"),
        (["--method", "reap", "--no-merge"], "--merge: found with method reap"),
        (["--method", "random", "--experts", "4", "--set", "a=1"], "parameter 'a', expected none"),
        (
            ["--method", "eep", "--train", TRAIN, "--experts", "4", "--top-k", "1,2,1,1"],
            "--top-k: found '1,2,1,1', expected one number",
        ),
        (
            ["--method", "eep", "--train", TRAIN, "--experts", "1"],
            "layer 0: keeps 1 of 8 experts, expected at least 2",
        ),
        (
            ["--method", "eep", "--train", TRAIN, "--experts", "4", "--groups", "9"],
            "groups is 9, expected at most 4",
        ),
        (
            ["--method", "eep", "--train", TRAIN, "--experts", "4", "--measure", "f1"],
            "measure is 'f1', expected one of",
        ),
        (
            ["--method", "eep", "--train", TRAIN, "--experts", "6", "--expert-parallel", "4"],
            "6 experts cannot be shared equally by --expert-parallel 4",
        ),
        (
            ["--method", "eep", "--train", TRAIN, "--experts", "4", "--dtype", "bla"],
            "--dtype: found 'bla', expected one of auto, bfloat16",
        ),
        (
            ["--method", "eep", "--train", TRAIN, "--experts", "4", "--engine", "llama"],
            "--engine: found 'llama', expected vllm, transformers or the URL",
        ),
        (["--method", "reap", "--actors", "2"], "--actors: found with method reap"),
        (
            ["--method", "eep", "--train", TRAIN, "--experts", "4", "--ray-address", "auto"],
            "--ray-address: found without --actors",
        ),
        (
            [
                *("--method", "eep", "--train", TRAIN, "--experts", "4", "--actors", "2"),
                *("--engine", "http://127.0.0.1:8001"),
            ],
            "--actors: found with the URL of a server",
        ),
    ],
)
def test_refusals_come_before_the_engine(
    arguments: list[object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LiveprunError, match=message):
        run("prune", DEMO, "-o", tmp_path / "out", *arguments)
    assert not list(tmp_path.iterdir())


def test_without_ray_actors_are_refused_before_calibrating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(IncompatibleEnvironmentError, match=r"pip install 'liveprune\[ray\]'"):
        run(*SEARCH, "-o", tmp_path / "out", "--actors", "2", "--start", "reap")
    assert not list(tmp_path.iterdir())


def test_rows_are_compared_before_the_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(transformers_engine, "TransformersEngine", start)
    with pytest.raises(DataError, match="found the same rows as dev"):
        run(*SEARCH, "-o", tmp_path / "out", "--dev", TRAIN)


def test_an_engine_that_does_not_start_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    def start(*_: object, **__: object) -> None:
        starts.append(1)
        raise EngineError("no engine today")

    monkeypatch.setattr(transformers_engine, "TransformersEngine", start)
    with pytest.raises(IncompatibleEnvironmentError, match="no engine today"):
        run(*SEARCH, "-o", tmp_path / "out")
    assert starts == [1]


def test_another_engine_does_not_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    run(*SEARCH, "-o", tmp_path / "a.json", "--plan-only", "--search-dir", folder)
    with pytest.raises(DataError, match="engine"):
        run(*SEARCH, "-o", tmp_path / "b", "--search-dir", folder, "--dtype", "float32")


def test_settings_are_read_by_name() -> None:
    found = parse_settings("paper", ["scale=0.1", "racing=true", "semantics=slice"], groups=2)
    assert (found.scale, found.racing, found.semantics, found.groups) == (0.1, True, "slice", 2)
    assert found.children == PRESETS["paper"].children
    assert parse_settings("liveprune", ["groups=each"], groups=None) == Settings(groups="each")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["scale"], "found 'scale', expected NAME=VALUE"),
        (["scale=much"], "--set scale: found 'much', expected a number"),
        (["racing=1"], "--set racing: found '1', expected true or false"),
        (["inits=true"], "--set inits: found 'true', expected a number or a word"),
        (["speed=1"], "found speed, expected some of groups, merge"),
        (["groups=2"], "found groups twice"),
        (["inits=0"], "inits is 0, expected a whole number from 1"),
    ],
)
def test_wrong_settings_are_named(changes: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_settings("liveprune", changes, groups=4)


def test_candidates_live_at_once_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # One candidate of 4 experts takes half of the experts' 32 x 3 x 128 x 192 bfloat16 numbers.
    one = 32 * 3 * 128 * 192 * 2 // 2
    model = engine_description._model_bytes(DEMO)

    def candidates(room: float, *, merges: bool = True) -> int:
        monkeypatch.setattr(
            engine_description, "_free_memory", lambda neighbours: model + int(2 * room * one)
        )
        described = EngineDescription(
            "vllm", DEMO, "bfloat16", 64, candidates=8, kept=(4,) * 4, merges=merges
        )
        return described.fitting_candidates()

    assert candidates(3.5) == 3
    assert candidates(100) == 8
    assert candidates(0.5) == 1
    assert candidates(0.5, merges=False) == 8
