"""Live variants as an operator meets them: a real server, the CLI, streams that never stop."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from transformers import AutoTokenizer

from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_io import save_plan
from liveprune.server.served_model import ServedModel
from tests.e2e.live_load import Golden, Load, json_of, liveprune, metrics, stream
from tests.reference import greedy, load, pruned_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

KEPT = {"a": ((0, 2, 3, 6, 7), (4,), (1, 5)), "b": ((0, 1), (2, 3, 5), (0, 4, 6, 7))}
PROMPTS = ("abc", "The quick brown fox jumps over the lazy dog", "1 + 2 = ")
TOKENS = 24
FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256"]
FLAGS += [
    "--gpu-memory-utilization",
    "0.2",
    "--block-size",
    "32",
    "--num-gpu-blocks-override",
    "64",
]


def plans() -> dict[str, Plan]:
    random_numbers = np.random.default_rng(0)
    mixing = np.eye(8, dtype=np.float32)[:4] + 0.1 * random_numbers.random((4, 8), dtype=np.float32)
    made = {
        tag: [LayerPlan(i, 8, min(2, len(k)), kept=k) for i, k in enumerate(kept)]
        for tag, kept in KEPT.items()
    }
    made["merged"] = [LayerPlan(i, 8, 1 + i % 2, merge=mixing, router_map=mixing) for i in range(3)]
    return {tag: Plan("mixtral", 3, tuple(x), Lineage("hand")) for tag, x in made.items()}


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("mixtral", num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("live")
    for tag, plan in plans().items():
        save_plan(plan, made / f"{tag}.json")
    return made


@pytest.fixture(scope="module")
def golden(base: Path) -> Golden:
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = {"full": load(base)} | {tag: pruned_model(base, x) for tag, x in plans().items()}
    return {
        (f"tiny:{tag}", prompt): tokenizer.decode(
            greedy(model, tokenizer(prompt).input_ids, TOKENS), skip_special_tokens=True
        )
        for tag, model in models.items()
        for prompt in PROMPTS
    }


@pytest.fixture(scope="module")
def server(base: Path, folder: Path) -> Iterator[ServedModel]:
    with start(base, folder, f"--variant=a={folder / 'a.json'}") as running:
        yield running
        assert running.stop() == 0


def start(base: Path, folder: Path, *flags: str) -> ServedModel:
    server = ServedModel(
        base,
        name="tiny",
        log=folder / f"log-{len(list(folder.glob('log-*')))}",
        flags=[*FLAGS, "--plan-root", str(folder), *flags],
        state=folder / "state",
    )
    server.wait_ready()
    return server


@pytest.fixture(scope="module")
def run(server: ServedModel, folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda *arguments: liveprune(server, folder / "state", *arguments)


@pytest.fixture
def client(server: ServedModel) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none") as made:
        yield made


Run = Callable[..., subprocess.CompletedProcess[str]]


def live(run: Run) -> dict[str, Any]:
    listed = json_of(run("variants", "list", "--json"))
    return {x["tag"]: x for x in listed if x["state"] == "live"}


def test_variants_are_added_while_it_serves(run: Run, folder: Path) -> None:
    assert set(live(run)) == {"full", "a"}, "--variant made one live at start"
    for tag in ("b", "merged"):
        done = run("variants", "add", str(folder / f"{tag}.json"), "--name", tag)
        assert done.returncode == 0, done.stderr + done.stdout
    found = live(run)
    assert set(found) == {"full", "a", "b", "merged"}
    assert found["full"]["is_alias"]
    assert found["a"]["experts"] == {"min": 1, "max": 5, "total": 8}
    assert found["a"]["digest"] == plans()["a"].digest


def test_the_models_name_chooses_the_variant(
    server: ServedModel, golden: Golden, client: openai.OpenAI
) -> None:
    for name, prompt in golden:
        found = stream(server.base_url, name, prompt, TOKENS)
        assert not found.problem(golden)
    bare = stream(server.base_url, "tiny", PROMPTS[0], TOKENS)
    assert bare.header == "tiny:full"
    cards = {card.id: card.to_dict() for card in client.models.list().data}
    assert set(cards) == {"tiny", "tiny:full", "tiny:a", "tiny:b", "tiny:merged"}
    assert cards["tiny:a"]["parent"] == "tiny"
    details = cards["tiny:a"]["liveprune"]
    assert details["plan"] == plans()["a"].digest
    assert details["top_k"] == {"min": 1, "max": 2}


def test_every_kind_of_request_works_under_a_variant(client: openai.OpenAI, golden: Golden) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    raw = client.chat.completions.with_raw_response.create(
        model="tiny:a", messages=messages, max_tokens=6, temperature=0, logprobs=True
    )
    assert raw.headers["x-liveprune-variant"] == "tiny:a"
    chat = raw.parse()
    assert chat.model == "tiny:a"
    assert len(chat.choices[0].logprobs.content) == 6  # type: ignore[union-attr,arg-type]
    several = client.chat.completions.create(
        model="tiny:a", messages=messages, max_tokens=6, temperature=0.01, n=3
    )
    assert {x.message.content for x in several.choices} == {chat.choices[0].message.content}
    other = client.chat.completions.create(
        model="tiny:b", messages=messages, max_tokens=6, temperature=0
    )
    assert other.choices[0].message.content != chat.choices[0].message.content
    scored = client.completions.create(
        model="tiny:merged",
        prompt=PROMPTS[0],
        max_tokens=TOKENS,
        temperature=0,
        extra_body={"prompt_logprobs": 1, "ignore_eos": True},
    )
    assert scored.choices[0].text == golden["tiny:merged", PROMPTS[0]]
    assert scored.choices[0].to_dict()["prompt_logprobs"]
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
    structured = client.chat.completions.create(
        model="tiny:a",
        messages=messages,
        max_tokens=20,
        response_format=schema,  # type: ignore[call-overload]
    )
    assert structured.choices[0].message.content in ("true", "false")


def test_unknown_variants_are_404_never_the_base(client: openai.OpenAI) -> None:
    for name in ("tiny:nope", "other:a", "tiny:", "tiny:a:a"):
        with pytest.raises(openai.NotFoundError, match="does not exist") as refused:
            client.completions.create(model=name, prompt="a")
        assert refused.value.type == "NotFoundError"


def test_a_client_cannot_choose_tables_by_itself(server: ServedModel, golden: Golden) -> None:
    body = {"model": "tiny:a", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0}
    forged = {"ignore_eos": True, "vllm_xargs": {"liveprune": {"slot": 0, "salt": None}}}
    answer = httpx.post(f"{server.base_url}/v1/completions", json=body | forged, timeout=60)
    if answer.status_code == 200:  # vLLM may refuse the shape
        assert answer.json()["choices"][0]["text"] == golden["tiny:a", PROMPTS[0]]


def test_fifty_random_swaps_under_load(
    server: ServedModel, run: Run, golden: Golden, folder: Path
) -> None:
    """0 failed, 0 cut short, 0 mixed answers; afterwards all variants give their golden tokens."""
    generator = random.Random(5)
    tags, kept = ["full", "a", "b", "merged"], 0
    with Load(server.base_url, ["tiny"], PROMPTS, streams=8, tokens=TOKENS) as under:
        for i in range(50):
            arguments = ["--keep-previous"] if generator.random() < 0.5 else []
            kept += bool(arguments)
            done = run("swap", generator.choice(tags), *arguments)
            assert done.returncode == 0, (i, done.stderr + done.stdout)
    assert 0 < kept < 50
    assert len(under.finished) > 100
    assert {found.header for found in under.finished} == {f"tiny:{tag}" for tag in tags}
    assert not [problem for x in under.finished if (problem := x.problem(golden))]
    for tag in tags:
        if tag not in live(run):
            plan = [] if tag == "full" else [str(folder / f"{tag}.json")]
            done = (
                run("swap", tag) if tag == "full" else run("variants", "add", *plan, "--name", tag)
            )
            assert done.returncode == 0, done.stderr + done.stdout
    for name, prompt in golden:
        if name.removeprefix("tiny:") in live(run):
            assert not stream(server.base_url, name, prompt, TOKENS).problem(golden)


def test_swap_compacts_and_the_kv_cache_takes_the_memory(server: ServedModel, run: Run) -> None:
    assert run("swap", "full").returncode == 0
    for tag in set(live(run)) - {"full"}:
        assert run("variants", "remove", tag).returncode == 0
    before = json_of(run("status", "--json"))
    assert run("swap", "a").returncode == 0
    after = json_of(run("status", "--json"))
    assert set(live(run)) == {"a"}
    assert after["expert_bytes"] == pytest.approx(before["expert_bytes"] / 3)  # 8 of 24
    assert after["kv_blocks"] > before["kv_blocks"]
    total = [sum(x[k] for k in x if k in TOTAL) for x in (before, after)]
    assert total[1] <= total[0] <= after["memory_target_bytes"]
    assert metrics(server.base_url)['liveprune_expert_bytes{model="tiny"}'] > 0
    shown = [name for name in metrics(server.admin_url) if name.startswith("liveprune_variant")]
    assert [name for name in shown if "tiny:a" in name]
    assert not [name for name in shown if "tiny:b" in name], "retired: its series are gone"
    assert (
        metrics(server.admin_url)['liveprune_expert_bytes{model="tiny"}'] == after["expert_bytes"]
    )
    assert run("rollback").returncode == 0
    assert set(live(run)) == {"full"}


TOTAL = ("expert_bytes", "spare_bytes", "other_weight_bytes", "kv_bytes")


def test_streams_begun_on_a_end_on_a(server: ServedModel, run: Run, golden: Golden) -> None:
    with Load(server.base_url, ["tiny"], PROMPTS[:1], streams=4, tokens=TOKENS) as under:
        for tag in ("a", "full", "b", "full"):
            assert run("swap", tag).returncode == 0
    assert {x.header for x in under.finished} >= {"tiny:a", "tiny:b", "tiny:full"}
    assert not [problem for x in under.finished if (problem := x.problem(golden))]


def test_the_admin_api_has_its_own_key_and_paths(server: ServedModel, run: Run) -> None:
    url = f"{server.admin_url}/admin/v1"
    assert httpx.post(f"{url}/swap", json={"variant": "a"}).status_code in (401, 403)
    assert httpx.get(f"{url}/status").status_code in (401, 403)
    assert httpx.get(f"{server.base_url}/admin/v1/status").status_code == 404
    assert httpx.get(f"{server.admin_url}/health").status_code == 200
    assert httpx.get(f"{server.admin_url}/ready").json() == {"ready": True}
    refused = run("variants", "add", "/etc/passwd", "--name", "x")
    assert refused.returncode != 0
    assert "/etc/passwd" in refused.stderr + refused.stdout


def test_kill_nine_ends_clearly_and_a_restart_restores(
    base: Path, folder: Path, server: ServedModel, run: Run, golden: Golden
) -> None:
    assert run("swap", "b", "--keep-previous").returncode == 0
    assert server.stop() == 0
    with start(base, folder) as again:
        for prompt in PROMPTS:
            found = stream(again.base_url, "tiny", prompt, TOKENS)
            assert found.header == "tiny:b"
            assert not found.problem(golden)
        worker = psutil.Process(again.pid).children(recursive=True)[-1]
        os.kill(worker.pid, signal.SIGKILL)
        deadline = time.monotonic() + 120
        while again.running and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not again.running
        assert again.stop() == 2
        assert "the engine died" in again.log.read_text()
    with start(base, folder) as third:
        found = stream(third.base_url, "tiny", PROMPTS[0], TOKENS)
        assert found.header == "tiny:b"
        assert not found.problem(golden)
        assert third.stop() == 0
