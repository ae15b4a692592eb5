"""``liveprune pareto`` on the shipped model: a small grid, resuming, and what is refused."""

from __future__ import annotations

import html
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from liveprune.pruning.demo import model_path, rows_path
from liveprune.pruning.errors import DataError, IncompatibleEnvironmentError, LiveprunError
from liveprune.pruning.evaluation import transformers_engine
from liveprune.pruning.evaluation.task import load_task
from liveprune.pruning.evaluation.transformers_engine import TransformersEngine
from liveprune.pruning.plan_io import load_plan
from liveprune.server import pareto_run
from liveprune.server.cli import app, main
from liveprune.server.pareto_options import SEARCH

DEMO = model_path()
TRAIN, DEV, TEST = (rows_path("sort", split) for split in ("train", "dev", "test"))
ROWS = 8
GRID = (
    *("pareto", DEMO, "--methods", "reap,weight-norm", "--experts", "2,9", "--top-k", "1"),
    *("--calibration", TRAIN, "--data", TEST, "--max-rows", ROWS, "--max-answer-tokens", "8"),
    *("--engine", "transformers", "--dtype", "float32", "--rounds", "0"),
)
PLANS = [
    *("reap-e2-k1", "weight-norm-e2-k1", "frequency-e2-k1"),
    *(f"random-e2-k1-s{seed}" for seed in range(3)),
]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of ``GRID``, and what it printed."""
    folder = tmp_path_factory.mktemp("pareto") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["/bin/liveprune", "pareto", "a model", "--rounds", "0"])
        return folder, run(*GRID, "-o", folder)


def test_plans_and_scores_are_those_of_the_reference(ran: tuple[Path, str]) -> None:
    folder, _ = ran
    report = report_of(folder)
    points = {point["name"]: point for point in report["points"]}
    assert sorted(points) == sorted(PLANS)
    plans = {name: load_plan(folder / points[name]["plan"]) for name in PLANS}
    for name, plan in plans.items():
        assert plan.digest == points[name]["digest"]
        assert plan.lineage.method == points[name]["method"]
        assert [(x.kept_experts, x.top_k) for x in plan.layers] == [(2, 1)] * 4
    task = load_task(TEST, DEMO, measure="exact", max_rows=ROWS, max_answer_tokens=8)
    engine = TransformersEngine(DEMO, dtype="float32")
    full, *values = task.values(engine, [None, *plans.values()]).mean(axis=1)
    assert report["full"]["score"]["mean"] == pytest.approx(full)
    for name, value in zip(plans, values, strict=True):
        assert points[name]["score"]["mean"] == pytest.approx(value), name


def test_what_is_skipped_and_not_timed_is_said(ran: tuple[Path, str]) -> None:
    folder, shown = ran
    report = report_of(folder)
    reason = "layer 0: experts is 9, expected 1 to 8"
    assert {x["name"] for x in report["skipped"]} == {
        f"{method}-e9-k1" for method in ("reap", "weight-norm", "random", "frequency")
    }
    assert all(reason in x["reason"] for x in report["skipped"])
    assert f"skipped reap-e9-k1: {reason}" in shown
    assert report["timing"] == {"left_out": "--rounds is 0", "workload": None}
    assert all(point["speed"] is None for point in report["points"])


def test_the_front_is_printed_with_how_to_serve_it(ran: tuple[Path, str]) -> None:
    folder, shown = ran
    report = report_of(folder)
    assert report["front"]
    lines = [
        shlex.split(line)
        for line in shown.splitlines()
        if line.startswith("  liveprune variants add")
    ]
    assert lines == [
        ["liveprune", "variants", "add", str(folder / f"plans/{name}.json"), "--name", name]
        for name in report["front"]
    ]
    assert all(Path(line[3]).is_file() for line in lines)
    assert f"report: {folder / 'report.html'}" in shown
    page = html.unescape((folder / "report.html").read_text())
    assert report["command"] == "liveprune pareto 'a model' --rounds 0"
    for words in (report["command"], *PLANS, "There is no chart of speed: --rounds is 0."):
        assert words in page


def test_run_again_it_does_nothing_new(
    ran: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shown = ran
    before, journal = report_of(folder), (folder / "journal.jsonl").read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(transformers_engine, "TransformersEngine", refuse)
    monkeypatch.setattr(pareto_run, "make_plan", refuse)
    assert run(*GRID, "-o", folder) == shown
    assert (folder / "journal.jsonl").read_bytes() == journal
    after = report_of(folder)
    del before["command"], after["command"]
    assert after == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--seed", "1"], r"arguments\.seed was 0, now is 1"),
        (["--top-k", "2"], r"arguments\.top_k"),
        (["--data", DEV], r"data\.sort\.dev"),
        (["--max-rows", ROWS - 1], r"data\.sort\.test"),
        (["--calibration", DEV], r"arguments\.calibration"),
        (["--dtype", "bfloat16"], "engine was 'transformers, float32'"),
        (["--rounds", "3"], "timing was None"),
    ],
)
def test_other_arguments_do_not_share_the_folder(
    changes: list[object], named: str, ran: tuple[Path, str]
) -> None:
    folder, _ = ran
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=rf"this folder holds another pareto: .*{named}"):
        run(*GRID, "-o", folder, *changes)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


REFUSED = [
    (["--methods", "reap,prune-it"], "prune-it"),
    (["--methods", ","], "--methods: found ',', expected at least one"),
    (["--experts", "2,2"], "--experts: found '2' twice"),
    (["--experts", "0-:2"], "--experts 0-:2: found '0-:2' for the names of plans"),
    (["--experts", "9"], "found nothing that can be run"),
    (["--experts", "many"], "many"),
    (["--top-k", "one"], "--top-k: found 'one'"),
    (["--data", TEST, "--data", TEST], "found the rows of sort.test again"),
    (["--calibration", TEST], "found among --calibration, too"),
    (["--calibration", "no.jsonl"], "no.jsonl: not readable"),
    (["--data", "no.jsonl"], "no.jsonl: not readable"),
    (["--measure", "f1"], "measure is 'f1', expected one of"),
    (["--train", TRAIN], f"--train: found without the method {SEARCH}"),
    (["--dev", DEV], f"--dev: found without the method {SEARCH}"),
    (["--set", "inits=3"], f"--set: found without the method {SEARCH}"),
    (["--preset", "paper"], f"--preset: found without the method {SEARCH}"),
    (["--methods", SEARCH], f"--train: missing, expected for method {SEARCH}"),
    (["--methods", SEARCH, "--train", TEST], "--train: found the rows of --data sort.test"),
    (["--methods", SEARCH, "--train", TRAIN, "--dev", TEST], "--dev: found the rows of --data"),
    (["--rounds", "2"], "rounds is 2, expected at least 3"),
    (["--rounds", "3", "--prompt-tokens", "9999"], "expected at most the model's"),
    (["--dtype", "bla"], "--dtype: found 'bla', expected one of auto, bfloat16"),
    (["--device", "tpu"], "--device: found 'tpu', expected cpu"),
    (["--engine", "llama"], "--engine: found 'llama', expected vllm, transformers or the URL"),
    (["--ray-address", "auto"], "--ray-address: found without --actors"),
    (
        ["--actors", "2", "--engine", "http://127.0.0.1:8001"],
        "--actors: found with the URL of a server",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refusals_come_before_the_engine(
    changes: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = dict(zip(map(str, GRID[2::2]), GRID[3::2], strict=True))
    kept = [part for flag, value in given.items() if flag not in changes for part in (flag, value)]
    with pytest.raises(LiveprunError, match=message):
        run(*GRID[:2], *kept, *changes, "-o", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_copy_of_the_calibration_rows_is_no_test(tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(TRAIN.read_bytes())
    with pytest.raises(DataError, match=r"copy\.jsonl: found among --calibration, too"):
        run(*GRID, "--data", copy, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_calibration_rows_are_read_before_the_first_plan(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "fine"}\n{"words": "unknown"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: found the keys \['words'\]"):
        run(*GRID, "--calibration", rows, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_text("mine")
    with pytest.raises(NotADirectoryError, match="found a file, expected a folder"):
        run(*GRID, "-o", output)
    assert output.read_text() == "mine"


def test_on_the_command_line_a_refusal_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*GRID, "--experts", "2,2", "-o", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["liveprune", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.err == "liveprune: --experts: found '2' twice, expected each budget once\n"
    assert shown.out == ""


def test_without_ray_actors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(IncompatibleEnvironmentError, match=r"pip install 'liveprune\[ray\]'"):
        run(*GRID, "--actors", "2", "-o", tmp_path / "out")
    assert not list(tmp_path.iterdir())
