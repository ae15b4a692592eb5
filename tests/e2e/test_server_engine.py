"""Candidates on a running server: scored as transformers scores them, and seen by nobody else."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from liveprune.pruning.errors import EngineError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_io import save_plan
from liveprune.server.served_model import ServedModel
from liveprune.server.server_engine import ServerEngine
from tests.e2e.live_load import Golden, Load, json_of, liveprune, metrics
from tests.e2e.test_live_server import FLAGS, PROMPTS, TOKENS, plans
from tests.reference import greedy, load, pruned_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

LENGTHS = ((5, 3), (1, 1), (40, 7), (2, 4), (150, 20), (33, 1), (64, 64))
"""Tokens of prompt and answer; the chunks below cut some of them."""
SERVED = "b"
SPARE_ROWS = 4


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("mixtral", num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def rows(base: Path) -> list[TokenRow]:
    size = int(load(base).config.vocab_size)
    draw = np.random.default_rng(3)

    def some(count: int) -> tuple[int, ...]:
        return tuple(int(x) for x in draw.integers(0, size, count))

    return [TokenRow(some(prompt), some(answer)) for prompt, answer in LENGTHS]


@pytest.fixture(scope="module")
def candidates() -> dict[str, Plan | None]:
    made = plans()
    return {"full": None, "pruned": made["a"], "merged": made["merged"], "live": made[SERVED]}


@pytest.fixture(scope="module")
def models(base: Path, candidates: dict[str, Plan | None]) -> dict[str, Any]:
    return {k: load(base) if p is None else pruned_model(base, p) for k, p in candidates.items()}


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    folder = tmp_path_factory.mktemp("candidates")
    save_plan(plans()[SERVED], folder / "served.json")
    flags = [*FLAGS, "--max-num-batched-tokens", "64", "--max-num-seqs", "12"]
    flags += ["--spare-rows", str(SPARE_ROWS)]
    with ServedModel(
        base,
        name="tiny",
        log=folder / "log",
        flags=[*flags, f"--variant={SERVED}={folder / 'served.json'}"],
        state=folder / "state",
    ) as running:
        running.wait_ready()
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def state(server: ServedModel) -> Path:
    return server.log.parent / "state"


@pytest.fixture
def engine(server: ServedModel, state: Path, base: Path) -> Iterator[ServerEngine]:
    key = (state / "admin.key").read_text().splitlines()[0]
    with ServerEngine(server.admin_url, key, base) as made:
        yield made


def _logs(model: Any, row: TokenRow) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*row.prompt, *row.answer]])).logits[0]
    return torch.log_softmax(logits.double(), -1)[len(row.prompt) - 1 : -1]


def _expected(models: dict[str, Any], name: str, rows: list[TokenRow]) -> AnswerScores:
    own = torch.cat([_logs(models[name], row) for row in rows])
    full = torch.cat([_logs(models["full"], row) for row in rows])
    answer = torch.tensor([token for row in rows for token in row.answer])
    return AnswerScores(
        own.argmax(-1).numpy(),
        own.gather(1, answer[:, None])[:, 0].numpy(),
        torch.minimum(own.exp(), full.exp()).sum(-1).numpy(),
        (full.exp() * (full - own)).sum(-1).numpy(),
    )


def _golden(base: Path, models: dict[str, Any]) -> Golden:
    tokenizer = AutoTokenizer.from_pretrained(base)
    names = {"tiny:full": "full", f"tiny:{SERVED}": "live"}
    return {
        (name, prompt): tokenizer.decode(
            greedy(models[key], tokenizer(prompt).input_ids, TOKENS), skip_special_tokens=True
        )
        for name, key in names.items()
        for prompt in PROMPTS
    }


def _run(server: ServedModel, state: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return liveprune(server, state, *words)


def _memory(server: ServedModel, state: Path) -> dict[str, Any]:
    status = json_of(_run(server, state, "status", "--json"))
    return {key: status[key] for key in status if key not in ("process_bytes", "variants")}


def test_scores_are_those_of_transformers_under_user_traffic(
    server: ServedModel,
    state: Path,
    engine: ServerEngine,
    base: Path,
    rows: list[TokenRow],
    candidates: dict[str, Plan | None],
    models: dict[str, Any],
) -> None:
    cards = httpx.get(f"{server.base_url}/v1/models").json()["data"]
    before = _memory(server, state)
    golden = _golden(base, models)
    names = ["tiny", f"tiny:{SERVED}"]
    with Load(server.base_url, names, PROMPTS, streams=4, tokens=TOKENS) as under:
        found = [engine.score(list(candidates.values()), rows, against_full=True) for _ in range(2)]
    assert len(under.finished) >= 4
    assert not [problem for x in under.finished if (problem := x.problem(golden))]
    assert {x.header for x in under.finished} == {"tiny:full", f"tiny:{SERVED}"}
    for scores in found:
        for name, one in zip(candidates, scores, strict=True):
            expected = _expected(models, name, rows)
            np.testing.assert_array_equal(one.predicted, expected.predicted, err_msg=name)
            for column in ("logprobs", "overlap", "divergence"):
                values, right = getattr(one, column), getattr(expected, column)
                np.testing.assert_allclose(values, right, atol=1e-4, rtol=0, err_msg=name)
    shown = httpx.get(f"{server.base_url}/v1/models").json()["data"]
    assert [x["id"] for x in shown] == [x["id"] for x in cards]
    assert _memory(server, state) == before
    assert not list(state.glob("*/candidates/*"))
    page = metrics(server.admin_url)
    assert not [name for name in page if "candidate" in name]


def test_generated_tokens_are_those_of_transformers(
    engine: ServerEngine, rows: list[TokenRow], candidates: dict[str, Plan | None], models: Any
) -> None:
    prompts = [row.prompt for row in rows]
    free = {
        name: [greedy(models[name], list(prompt), 12) for prompt in prompts] for name in candidates
    }
    end = {free["pruned"][0][4], free["merged"][2][6]}
    found = engine.generate(list(candidates.values()), prompts, max_tokens=12, end=end)
    for name, answers in zip(candidates, found, strict=True):
        for answer, whole in zip(answers, free[name], strict=True):
            stop = next((i + 1 for i, token in enumerate(whole) if token in end), 12)
            assert list(answer) == whole[:stop]


def test_a_bad_plan_is_an_error_and_changes_nothing(
    server: ServedModel, state: Path, engine: ServerEngine, rows: list[TokenRow]
) -> None:
    before = _memory(server, state)
    draw = np.random.default_rng(1)
    for count, experts, match in (
        (3, 7, "7 experts, the model has 8"),
        (SPARE_ROWS + 1, 8, f"merges 5 experts, found {SPARE_ROWS} free spare rows"),
    ):
        mix = draw.random((count, experts), dtype=np.float32)
        layers = [LayerPlan(i, experts, 1, merge=mix, router_map=mix) for i in range(3)]
        plan = Plan("mixtral", 3, tuple(layers), Lineage("hand"))
        with pytest.raises(EngineError, match=match):
            engine.score([None, plan], rows)
    with pytest.raises(EngineError, match="found the token 1000000"):
        engine.score([None], [TokenRow((1,), (1_000_000,))])
    with pytest.raises(EngineError, match="not answered"):
        engine.score([None], [TokenRow((1,) * 300, (1,))])
    assert _memory(server, state) == before


def test_operations_go_before_candidates(
    server: ServedModel,
    state: Path,
    engine: ServerEngine,
    rows: list[TokenRow],
    candidates: dict[str, Plan | None],
    models: dict[str, Any],
) -> None:
    import threading

    found: list[AnswerScores] = []
    done = threading.Event()

    def search() -> None:
        while not done.is_set():
            found.extend(engine.score([candidates["merged"]], rows))

    searching = threading.Thread(target=search)
    searching.start()
    try:
        for tag in (SERVED, "full", SERVED, "full"):
            swapped = _run(server, state, "swap", tag, "--keep-previous")
            assert swapped.returncode == 0, swapped.stderr + swapped.stdout
    finally:
        done.set()
        searching.join()
    expected = _expected(models, "merged", rows)
    assert found
    for one in found:
        np.testing.assert_allclose(one.logprobs, expected.logprobs, atol=1e-4, rtol=0)
        assert one.overlap is one.divergence is None
