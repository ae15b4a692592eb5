"""The product's story (docs/story.md): from users' traffic to a smaller variant, and back.

A server answers a mix of two tasks. A job learns from what the engine counted meanwhile, and its
variant is made live, swapped in and rolled back, while users go on asking. No request fails, and
every answer is the one that its variant gives in the reference.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer

from liveprune.pruning.demo import model_path, rows_path
from liveprune.pruning.plan_io import load_plan
from liveprune.server.live_options import model_state
from liveprune.server.served_model import ServedModel
from tests.e2e.live_load import Load, json_of, liveprune
from tests.reference import greedy, load, pruned_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256"]
FLAGS += ["--gpu-memory-utilization", "0.2", "--block-size", "32", "--max-num-seqs", "16"]
FLAGS += ["--num-gpu-blocks-override", "64", "--statistics-every", "1", "--statistics-sample", "64"]
FLAGS += ["--statistics-interval", "1"]
TOKENS = 8
COUNTED = 4000
"""Tokens of users that the job learns from."""

Run = Callable[..., subprocess.CompletedProcess[str]]


def mix() -> dict[str, str]:
    """Users' prompts and the right answers: two of sorting to one of shifting letters."""
    rows = {
        task: [json.loads(x) for x in rows_path(task, "dev").read_text().splitlines()]
        for task in ("sort", "shift")
    }
    asked = [
        row
        for i in range(20)
        for row in (rows["sort"][2 * i], rows["sort"][2 * i + 1], rows["shift"][i])
    ]
    return {row["prompt"]: row["answer"] for row in asked}


ANSWERS = mix()
PROMPTS = tuple(ANSWERS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    folder = tmp_path_factory.mktemp("story")
    with ServedModel(
        model_path(), name="demo", log=folder / "log", flags=FLAGS, state=folder / "state"
    ) as running:
        running.wait_ready()
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def run(server: ServedModel) -> Run:
    return lambda *words: liveprune(server, server.log.parent / "state", *words)


def counted(run: Run) -> float:
    tokens: dict[str, float] = json_of(run("statistics", "--json"))["tokens"]
    return sum(tokens.values())


def right_answers(plans: dict[str, Any]) -> dict[tuple[str, str], str]:
    tokenizer, base = AutoTokenizer.from_pretrained(model_path()), load(model_path())
    models = {tag: base if x is None else pruned_model(model_path(), x) for tag, x in plans.items()}
    return {
        (f"demo:{tag}", prompt): tokenizer.decode(
            greedy(model, tokenizer(prompt).input_ids, TOKENS), skip_special_tokens=True
        )
        for tag, model in models.items()
        for prompt in PROMPTS
    }


def test_from_traffic_to_a_smaller_variant_and_back(server: ServedModel, run: Run) -> None:
    with Load(server.base_url, ["demo"], PROMPTS, streams=3, tokens=TOKENS) as users:
        while counted(run) < COUNTED:
            time.sleep(1)
        started = run(
            *("jobs", "start", "--method", "reap", "--experts", "4", "--name", "mix"),
            *("--live-statistics", "--make-live", "--json"),
        )
        job = json_of(run("jobs", "show", str(json_of(started)["id"]), "--wait", "--json"))
        assert job["state"] == "done", run("jobs", "logs", job["id"]).stdout
        for words in (["swap", "mix"], ["rollback"], ["swap", "mix"]):
            done = run(*words)
            assert done.returncode == 0, done.stderr + done.stdout
            before = len(users.finished)
            while len(users.finished) < before + 6:  # some that began after it
                time.sleep(0.1)
    state = model_state(server.log.parent / "state", model_path())
    plan = load_plan(state / "plans" / f"{job['result']['digest']}.json")
    assert [layer.kept_experts for layer in plan.layers] == [4] * 4
    right = right_answers({"full": None, "mix": plan})
    assert not [problem for x in users.finished if (problem := x.problem(right))]
    assert {x.header for x in users.finished} == {"demo:full", "demo:mix"}
    # Half of the experts still do what the traffic needs.
    for tag in ("full", "mix"):
        solved = [right[f"demo:{tag}", x].startswith(answer) for x, answer in ANSWERS.items()]
        assert sum(solved) / len(solved) > 0.9, tag
    known = {x["tag"]: x for x in json_of(run("variants", "list", "--json"))}
    assert known["mix"]["is_alias"]
