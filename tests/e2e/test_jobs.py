"""Background pruning on a running server: jobs on its engine, under users' streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from liveprune.pruning.demo import model_path, rows_path
from liveprune.pruning.plan_io import load_plan
from liveprune.pruning.prune import make_plan
from liveprune.server.admin_client import AdminClient
from liveprune.server.served_model import ServedModel
from tests.e2e.live_load import Golden, Load, json_of, liveprune, metrics
from tests.reference import greedy, load, pruned_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256"]
FLAGS += ["--gpu-memory-utilization", "0.2", "--block-size", "32"]
FLAGS += ["--num-gpu-blocks-override", "64", "--max-num-seqs", "16"]
TRAIN, DEV = (rows_path("sort", split).resolve() for split in ("train", "dev"))
PROMPTS = tuple(json.loads(line)["prompt"] for line in TRAIN.read_text().splitlines()[:3])
TOKENS = 16
EEP = ["--method", "eep", "--experts", "4", "--data", str(TRAIN), "--dev", str(DEV)]
EEP += ["--max-rows", "8", "--seed", "4", "--share", "1"]
for _setting in ("merge=false", "prune_candidates=40", "inits=8", "groups=1", "dev_num=3"):
    EEP += ["--set", _setting]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    folder = tmp_path_factory.mktemp("jobs")
    with ServedModel(
        model_path(),
        name="demo",
        log=folder / "log",
        flags=[*FLAGS, "--plan-root", str(TRAIN.parent)],
        state=folder / "state",
    ) as running:
        running.wait_ready()
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def state(server: ServedModel) -> Path:
    return server.log.parent / "state"


@pytest.fixture(scope="module")
def run(server: ServedModel, state: Path) -> Run:
    return lambda *words: liveprune(server, state, *words)


@pytest.fixture
def client(server: ServedModel, state: Path) -> Iterator[AdminClient]:
    key = (state / "admin.key").read_text().splitlines()[0]
    with AdminClient(server.admin_url, key) as made:
        yield made


def start(run: Run, name: str, *words: str) -> str:
    return str(json_of(run("jobs", "start", "--name", name, *words, "--json"))["id"])


def ended(run: Run, job: str) -> dict[str, Any]:
    found: dict[str, Any] = json_of(run("jobs", "show", job, "--wait", "--json"))
    return found


def until(client: AdminClient, job: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    for _ in range(3000):
        found = client.job(job)
        if holds(found):
            return found
        assert found["state"] not in ("done", "failed", "cancelled"), found
        time.sleep(0.05)
    raise AssertionError(client.job_log(job))


def golden(names: dict[str, Any]) -> Golden:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    base = load(model_path())
    models = {tag: base if x is None else pruned_model(model_path(), x) for tag, x in names.items()}
    return {
        (f"demo:{tag}", prompt): tokenizer.decode(
            greedy(model, tokenizer(prompt).input_ids, TOKENS), skip_special_tokens=True
        )
        for tag, model in models.items()
        for prompt in PROMPTS
    }


def test_a_job_under_traffic_becomes_a_variant_that_is_swapped_in_and_out(
    server: ServedModel, run: Run
) -> None:
    expected = make_plan(model_path(), method="reap", experts="4", calibration=TRAIN, max_rows=32)
    right = golden({"full": None, "e4": expected})
    words = ["--method", "reap", "--experts", "4", "--data", str(TRAIN), "--dev", str(DEV)]
    with Load(server.base_url, ["demo"], PROMPTS, streams=2, tokens=TOKENS) as under:
        job = ended(run, start(run, "e4", *words, "--max-rows", "32", "--make-live"))
        assert job["state"] == "done", run("jobs", "logs", job["id"]).stdout
        for words in (["swap", "e4", "--keep-previous"], ["rollback"], ["swap", "e4"]):
            done = run(*words)
            assert done.returncode == 0, done.stderr + done.stdout
        before = len(under.finished)
        while len(under.finished) < before + 4:
            time.sleep(0.1)
        learned = ended(
            run, start(run, "mix", "--method", "frequency", "--experts", "4", "--live-statistics")
        )
        assert learned["state"] == "done", run("jobs", "logs", learned["id"]).stdout
    assert run("rollback").returncode == 0
    assert not [problem for x in under.finished if (problem := x.problem(right))]
    assert {x.header for x in under.finished} == {"demo:full", "demo:e4"}
    assert job["result"]["digest"] == expected.digest
    assert job["result"]["live"]
    assert job["result"]["scores"]["dev"]["full"]["mean"] > 0.5
    assert job["cost"]["evaluations"] > 0


def test_a_killed_worker_goes_on_to_the_same_plan(
    server: ServedModel, run: Run, client: AdminClient, state: Path
) -> None:
    unbroken = ended(run, start(run, "one", *EEP))
    assert unbroken["state"] == "done", run("jobs", "logs", unbroken["id"]).stdout
    job = start(run, "two", *EEP)
    for _ in range(2):
        before = client.job(job)["cost"].get("evaluations", 0)
        until(client, job, lambda found: found["cost"].get("evaluations", 0) > before)  # noqa: B023
        os.kill(worker(server, job), signal.SIGKILL)
    broken = ended(run, job)
    assert broken["state"] == "done", run("jobs", "logs", job).stdout
    for part in ("digest", "scores", "experts"):
        assert broken["result"][part] == unbroken["result"][part], part
    (plan,) = {
        load_plan(p).digest for p in state.glob(f"*/plans/{broken['result']['digest']}.json")
    }
    assert plan == broken["result"]["digest"]
    known = {x["tag"]: x for x in json_of(run("variants", "list", "--json"))}
    assert known["two"]["state"] == "standby", "found, and not made live"
    assert known["two"]["digest"] == plan


def test_the_switch_stops_background_work(
    server: ServedModel, run: Run, client: AdminClient
) -> None:
    # Long enough for all that is looked at while it runs.
    longer = {"prune_candidates=16": "prune_candidates=96"}
    job = start(run, "three", *(longer.get(word, word) for word in EEP))
    until(client, job, lambda found: found["cost"].get("evaluations", 0) > 0)
    page = metrics(server.admin_url)
    assert page['liveprune_job_evaluations_total{model="demo",variant="demo:three"}'] > 0
    assert run("background", "off").returncode == 0
    stopped = until(client, job, lambda found: found["state"] == "queued")
    time.sleep(3)
    now = json_of(run("jobs", "show", job, "--json"))
    assert now["state"] == "queued"
    assert now["cost"] == stopped["cost"]
    assert "queued" in run("jobs", "list").stdout
    assert run("background", "on").returncode == 0
    assert ended(run, job)["state"] == "done"
    page = metrics(server.admin_url)
    assert not [name for name in page if name.startswith("liveprune_job_")]
    assert page['liveprune_jobs{model="demo",state="done"}'] == 5


def worker(server: ServedModel, job: str) -> int:
    """Process id of the job's worker."""
    for child in psutil.Process(server.pid).children(recursive=True):
        if job in child.cmdline():
            return child.pid
    raise AssertionError(f"{job}: no worker")
