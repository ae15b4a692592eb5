from __future__ import annotations

import importlib.metadata as metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from liveprune.pruning.errors import LiveprunError
from liveprune.pruning.plan_io import load_plan
from liveprune.server.cli import app
from liveprune.server.cli_options import number_or_list

TinyModel = Callable[..., Path]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_prune_inspect_and_apply_agree(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("mixtral")
    run("prune", base, "-o", tmp_path / "p.json", "--method", "random", "--experts", "3,8,5",
        "--top-k", "1", "--seed", "7", "--plan-only")  # fmt: skip
    plan = load_plan(tmp_path / "p.json")
    assert [layer.kept_experts for layer in plan.layers] == [3, 8, 5]
    assert plan.lineage.method == "random"
    run("apply", base, tmp_path / "p.json", "-o", tmp_path / "out")
    shown = json.loads(run("inspect", tmp_path / "out", "--json"))
    assert [(x["layer"], x["experts"], x["kept"], x["top_k"]) for x in shown["layers"]] == [
        (0, 8, 3, 1),
        (1, 8, 8, 1),
        (2, 8, 5, 1),
    ]
    assert shown["digest"] == plan.digest
    size = shown["layers"][1]["bytes"] // 8
    assert [x["bytes"] for x in shown["layers"]] == [3 * size, 8 * size, 5 * size]
    table = run("inspect", tmp_path / "p.json")
    assert plan.digest in table
    # Pruning straight to a checkpoint gives the same plan.
    run("prune", base, "-o", tmp_path / "direct", "--method", "random", "--experts", "3,8,5",
        "--top-k", "1", "--seed", "7")  # fmt: skip
    assert load_plan(tmp_path / "direct") == plan


def test_a_plan_can_be_exported_and_read_back(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("qwen2_moe")
    run("prune", base, "-o", tmp_path / "p.json", "--method", "aimer", "--experts", "5",
        "--plan-only")  # fmt: skip
    run("export", tmp_path / "p.json", "-o", tmp_path / "report.json")
    kept = load_plan(tmp_path / "p.json").layers[1].kept
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["model.layers.1.mlp"] == list(kept)
    run("apply", base, tmp_path / "report.json", "-o", tmp_path / "out")
    assert load_plan(tmp_path / "out").layers[1].kept == kept


def test_calibration_results_are_found_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "hello there"}\n{"text": "12 + 34"}\n')
    for method in ("reap", "frequency"):
        run("prune", tiny_model("olmoe"), "-o", tmp_path / f"{method}.json", "--method", method,
            "--experts", "4", "--calibration", rows, "--plan-only",
            "--statistics-cache", tmp_path / "cache")  # fmt: skip
    assert len(list((tmp_path / "cache").iterdir())) == 1
    one, other = (load_plan(tmp_path / f"{m}.json").lineage for m in ("reap", "frequency"))
    assert one.calibration == other.calibration


def test_counts_may_come_from_a_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "counts.json").write_text('{"num_experts_per_layer": [5, 6, 7]}')
    run("prune", tiny_model("mixtral"), "-o", tmp_path / "p.json", "--method", "aimer",
        "--experts", f"@{tmp_path / 'counts.json'}", "--plan-only")  # fmt: skip
    plan = load_plan(tmp_path / "p.json")
    assert [layer.kept_experts for layer in plan.layers] == [5, 6, 7]


def test_a_taken_output_is_refused_before_work(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        run("prune", tiny_model("mixtral"), "-o", tmp_path / "out", "--method", "random",
            "--experts", "4")  # fmt: skip


def test_an_output_that_cannot_be_made_is_refused_before_work(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for arguments in (
        ["-o", tmp_path / "file" / "x"],
        ["-o", tmp_path / "file", "--plan-only"],
        ["-o", tmp_path, "--plan-only"],
    ):
        with pytest.raises(OSError, match=r"not a folder that can be written|expected a new file"):
            run("prune", tiny_model("mixtral"), "--method", "random", "--experts", "4", *arguments)


def test_the_version_is_the_distributions() -> None:
    assert run("--version") == f"liveprune {metadata.version('liveprune')}\n"


def test_bad_numbers_and_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(LiveprunError, match="no such folder"):
        run("prune", tmp_path / "none", "-o", tmp_path / "o", "--method", "random",
            "--experts", "4")  # fmt: skip
    with pytest.raises(LiveprunError, match="--skip-layers: found 'a,b'"):
        run("prune", tmp_path, "-o", tmp_path / "o", "--method", "random", "--experts", "4",
            "--skip-layers", "a,b")  # fmt: skip


def test_an_error_is_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "liveprune.server", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("liveprune: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("2", 2), ("2,1,1", [2, 1, 1]), ("3,", [3])]
)
def test_number_or_list(text: str | None, expected: object) -> None:
    assert number_or_list("--top-k", text) == expected
