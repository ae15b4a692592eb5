"""``liveprune prune --allocate evoesap`` on the shipped model, scored by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from liveprune.pruning.demo import model_path, rows_path
from liveprune.pruning.errors import DataError, LiveprunError
from liveprune.pruning.evaluation.transformers_engine import TransformersEngine
from liveprune.pruning.plan_io import CHECKPOINT_PLAN, load_plan
from liveprune.server.cli import app

DEMO = model_path()
TRAIN, DEV, TEST = (rows_path("add", split) for split in ("train", "dev", "test"))
SEARCH = (
    *("prune", DEMO, "--method", "reap", "--allocate", "evoesap", "--engine", "transformers"),
    *("--calibration", TRAIN, "--train", TRAIN, "--max-rows", "6", "--seed", "2"),
)
EVOESAP = (*SEARCH, "--set", "population=5", "--set", "elites=2", "--set", "generations=2")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


class Calls:
    """Counts what the engine is asked; ``stop`` interrupts that call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.count = 0
        original = TransformersEngine.score

        def score(engine: TransformersEngine, *arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == stop:
                raise KeyboardInterrupt
            return original(engine, *arguments, **options)

        monkeypatch.setattr(TransformersEngine, "score", score)


def test_the_budget_is_met_and_the_search_told(tmp_path: Path) -> None:
    """A fraction of 0.6 of 8: 3 go from each of 4 layers, and 20 of 32 stay, shared out anew."""
    out = tmp_path / "pruned"
    shown = run(*EVOESAP, "--experts", "0.6", "--dev", DEV, "--test", TEST, "-o", out)
    plan = load_plan(out / CHECKPOINT_PLAN)
    counts = [layer.kept_experts for layer in plan.layers]
    assert sum(counts) == 20
    assert min(counts) >= 2, "top-k"
    assert f"plan {plan.digest}: 20 of 32 experts kept" in shown
    assert (plan.lineage.method, plan.lineage.parameters["allocate"]) == ("reap", "evoesap")
    facts = plan.lineage.scores["allocation"]
    assert [8 - removed for removed in facts["removals"]] == counts
    assert (facts["population"], facts["generations"], facts["measure"]) == (5, 2, "esap")
    assert facts["scores"].keys() == {"train", "dev", "test"}
    assert 5 < facts["evaluated"] <= 5 + 2 * (5 - 2)
    for layer in plan.layers:  # within its layer, who is kept is the method's affair
        scores = [score or 0.0 for score in plan.lineage.scores[str(layer.layer)]]
        kept, gone = ([scores[i] for i in ids] for ids in (layer.kept, layer.pruned))
        assert min(kept) >= max(gone, default=0.0)
    layers = json.loads(run("inspect", out, "--json"))["layers"]
    assert [layer["kept"] for layer in layers] == counts


def test_run_again_it_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*EVOESAP, "--experts", "5", "--plan-only", "--search-dir")
    with monkeypatch.context() as patched:
        whole = Calls(patched)
        first = run(*options, tmp_path / "s", "-o", tmp_path / "a.json")
    assert whole.count > 3
    with monkeypatch.context() as patched:
        again = Calls(patched, stop=1)
        second = run(*options, tmp_path / "s", "-o", tmp_path / "b.json")
    assert again.count == 0, "everything stands in the journal"
    assert second.replace("b.json", "a.json") == first
    assert load_plan(tmp_path / "a.json") == load_plan(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()

    # Interrupted half-way, then the same command once more.
    half = whole.count // 2 + 1
    with monkeypatch.context() as patched:
        Calls(patched, stop=half)
        result = CliRunner().invoke(
            app, [str(a) for a in (*options, tmp_path / "t", "-o", tmp_path / "c.json")]
        )
        assert result.exit_code != 0
    assert not (tmp_path / "c.json").exists()
    with monkeypatch.context() as patched:
        rest = Calls(patched)
        run(*options, tmp_path / "t", "-o", tmp_path / "c.json")
    assert rest.count == whole.count - half + 1
    assert (tmp_path / "c.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    with pytest.raises(DataError, match="seed"):
        run(*options, tmp_path / "t", "-o", tmp_path / "d.json", "--seed", "3")
    assert not (tmp_path / "d.json").exists()


def test_bounds_skipped_layers_and_allowed_counts_hold(tmp_path: Path) -> None:
    """Layer 1 stays whole; 3 layers share 15, none above 6 or below 4, then down to even counts."""
    run(
        *(*EVOESAP, "--experts", "5", "--skip-layers", "1", "--snap", "servable"),
        *("--expert-parallel", "2", "--min-experts", "4", "--max-experts", "6"),
        *("--plan-only", "-o", tmp_path / "plan.json", "--top-k", "1"),
    )
    plan = load_plan(tmp_path / "plan.json")
    facts = plan.lineage.scores["allocation"]
    removals = facts["removals"]
    assert sum(removals) == 3 * (6 - 5), "counted from the ceiling"
    assert all(0 <= x <= 2 for x in removals)
    counts = [6 - x for x in removals]
    counts = [count - count % 2 for count in counts]
    assert [layer.kept_experts for layer in plan.layers] == [counts[0], 8, *counts[1:]]
    assert [layer.top_k for layer in plan.layers] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "4,4,4,4"], "allocate is 'global' and experts a list per layer"),
        ([], "--experts: missing, expected for --allocate evoesap"),
        (["--experts", "1"], "expected at least"),
        (["--experts", "5", "--no-merge"], "--merge: found with method reap"),
        (["--experts", "5", "--groups", "2"], "--groups: found with method reap"),
        (["--experts", "5", "--set", "population=0"], "population is 0, expected a whole number"),
        (["--experts", "5", "--set", "elites=40"], "elites is 40, expected at most the population"),
        (["--experts", "5", "--set", "speed=6"], "parameter 'speed'"),
        (["--experts", "5", "--measure", "f1"], "measure is 'f1', expected one of"),
        (["--experts", "5", "--engine", "llama"], "--engine: found 'llama'"),
        (["--experts", "5", "--snap", "some"], "--snap: found 'some'"),
        (["--experts", "5", "--expert-parallel", "2"], "--expert-parallel 2: found without --snap"),
        (["--experts", "5", "--max-experts", "4"], "20 kept in 4 layers, expected at most 16"),
        (["--experts", "5", "--skip-layers", "9"], r"skip_layers is \[9\]"),
    ],
)
def test_refusals_come_before_the_engine(
    arguments: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    with pytest.raises(LiveprunError, match=message):
        run(*SEARCH, "-o", tmp_path / "out", *arguments)
    assert calls.count == 0
    assert not list(tmp_path.iterdir())


def test_rows_to_score_on_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--train: missing, expected for --allocate evoesap"):
        run(
            *("prune", DEMO, "--method", "reap", "--allocate", "evoesap", "--experts", "5"),
            *("-o", tmp_path / "out"),
        )
