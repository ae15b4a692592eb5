"""Live statistics and kept prompts as an operator meets them: a real server and the CLI."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from transformers import AutoTokenizer

from liveprune.pruning.calibration.observer import observe
from liveprune.pruning.calibration.rows import Rows, load_rows
from liveprune.pruning.calibration.statistics import RoutingStatistics
from liveprune.pruning.plan_io import load_plan, save_plan
from liveprune.pruning.prune import make_plan
from liveprune.server.live_options import model_state
from liveprune.server.served_model import ServedModel
from tests.e2e.live_load import json_of, liveprune, metrics
from tests.e2e.test_live_server import FLAGS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

PROMPTS = ("abc", "The quick brown fox jumps over the lazy dog", "call 5551234 now", "1 + 2 = ")
STATISTICS = ["--statistics-sample", "256", "--statistics-every", "1"]
KEEP = ["--keep-prompts", "1", "--redact", r"\d{7}"]


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("mixtral", num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live-statistics")


def start(base: Path, folder: Path, number: int) -> ServedModel:
    flags = [*FLAGS, "--no-enable-prefix-caching", "--plan-root", str(folder), *STATISTICS, *KEEP]
    state, log = folder / "state", folder / f"log-{number}"
    server = ServedModel(base, name="tiny", log=log, flags=flags, state=state)
    server.wait_ready()
    return server


@pytest.fixture(scope="module")
def story(base: Path, folder: Path) -> dict[str, Any]:
    """What was seen on the way: traffic, a plan made from it, a swap to it, a restart."""
    seen: dict[str, Any] = {}
    file, plan = folder / "live.safetensors", folder / "plan.json"
    state = folder / "state"
    with start(base, folder, 0) as server:
        ask(server, "tiny")
        ask(server, "tiny:full")  # somebody who pins a variant is not the alias's user
        assert liveprune(server, state, "statistics", "-o", str(file)).returncode == 0
        save_plan(make_plan(base, method="reap", experts=4, statistics=file), plan)
        for command in (["variants", "add", str(plan), "--name", "live"], ["swap", "live"]):
            done = liveprune(server, state, *command)
            assert done.returncode == 0, done.stderr
        ask(server, "tiny")
        seen["after swap"] = json_of(liveprune(server, state, "statistics", "--json"))
        seen["metrics"] = metrics(server.base_url)
        assert server.stop() == 0
    with start(base, folder, 1) as server:
        seen["after restart"] = json_of(liveprune(server, state, "statistics", "--json"))
        assert server.stop() == 0
    return seen


def ask(server: ServedModel, model: str) -> None:
    for prompt in PROMPTS:
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=120).raise_for_status()


def tokens(base: Path) -> tuple[Any, ...]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    return tuple(np.array(tokenizer(prompt).input_ids) for prompt in PROMPTS)


def test_the_file_is_what_a_pass_over_the_prompts_gives(
    story: dict[str, Any], base: Path, folder: Path
) -> None:
    found = RoutingStatistics.load(folder / "live.safetensors")
    right = observe(base, Rows(tokens(base)))
    assert (found.tokens, found.model) == (right.tokens, right.model)
    for index, layer in right.layers.items():
        # Some seconds have passed, so the weights are a little less than one.
        np.testing.assert_allclose(found.layers[index].sums, layer.sums, rtol=1e-2, atol=1e-3)
        assert np.isnan(found.layers[index].contribution).all()


def test_the_plan_is_the_one_from_the_rows(
    story: dict[str, Any], base: Path, folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in PROMPTS))
    assert load_plan(folder / "plan.json") == make_plan(
        base, method="reap", experts=4, calibration=rows
    )


def test_each_variant_has_its_own_window(story: dict[str, Any], base: Path) -> None:
    total = sum(map(len, tokens(base)))
    found = story["after swap"]
    assert found["serving"] == "tiny:live"
    assert found["tokens"] == pytest.approx(dict.fromkeys(["tiny:full", "tiny:live"], total), 0.05)
    assert {layer["unused"] >= 4 for layer in found["layers"].values()} == {True}
    assert "found" in found["why_no_drift"], "too few tokens"


def test_windows_outlive_the_server(story: dict[str, Any]) -> None:
    before, after = story["after swap"]["tokens"], story["after restart"]["tokens"]
    assert after == pytest.approx(before, rel=0.05)


def test_the_metrics_count_tokens(story: dict[str, Any], base: Path) -> None:
    total = sum(map(len, tokens(base)))
    name = "liveprune_statistics_tokens_total"
    found = {key: value for key, value in story["metrics"].items() if key.startswith(name)}
    labels = ['model="tiny",variant="tiny:full"', 'model="tiny",variant="tiny:live"']
    assert found == {f"{name}{{{label}}}": total for label in labels}


def test_the_aliass_prompts_are_kept_and_redacted(
    story: dict[str, Any], base: Path, folder: Path, tmp_path: Path
) -> None:
    files = sorted((model_state(folder / "state", base) / "prompts").iterdir())
    rows = [json.loads(file.read_text()) for file in files]
    asked = [prompt.replace("5551234", "[redacted]") for prompt in PROMPTS]
    kept = [row["prompt"] for row in rows]
    assert sorted(kept) == sorted(p for p in 2 * asked if p in kept)
    assert set(kept) <= set(asked)
    assert kept, "answers of one token may be empty text, but not all of them"
    joined = tmp_path / "rows.jsonl"
    joined.write_text("".join(file.read_text() for file in files))
    assert len(load_rows(joined, base, vocab_size=10**6).token_ids) == len(rows)
    log = (folder / "log-0").read_text()
    assert "5551234" not in log
