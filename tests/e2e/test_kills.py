"""kill -9 of worker, API server and engine at random points, under traffic.

After each: the store is consistent, no variant is half published, the last published state serves,
and in the end the job has found what it finds unbroken. ``LIVEPRUNE_KILLS`` says how often; the
documented run had 50.
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.demo import model_path
from liveprune.server.live_options import model_state
from liveprune.server.served_model import ServedModel
from liveprune.server.store.check import check
from liveprune.server.store.store import Store
from tests.e2e.live_load import Load, json_of, liveprune, stream
from tests.e2e.test_jobs import DEV, EEP, FLAGS, PROMPTS, TOKENS, TRAIN

KILLS = int(os.environ.get("LIVEPRUNE_KILLS", "3"))
VICTIMS = ("worker", "engine", "server")

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600 + 240 * KILLS)]


def start(folder: Path, number: int) -> ServedModel:
    flags = [*FLAGS, "--plan-root", str(TRAIN.parent)]
    log, state = folder / f"log-{number}", folder / "state"
    server = ServedModel(model_path(), name="demo", log=log, flags=flags, state=state)
    server.wait_ready()
    return server


def ask(server: ServedModel, folder: Path, *words: str) -> Any:
    return json_of(liveprune(server, folder / "state", *words, "--json"))


def state_of(server: ServedModel, folder: Path, job: str) -> str:
    return str(ask(server, folder, "jobs", "show", job)["state"])


def victim(server: ServedModel, kind: str, job: str) -> psutil.Process | None:
    """The process to kill; None if there is no worker at the moment."""
    root = psutil.Process(server.pid)
    workers = [x for x in root.children(recursive=True) if job in x.cmdline()]
    if kind == "worker":
        return workers[0] if workers else None
    if kind == "server":
        return root
    return next(x for x in root.children(recursive=True) if "EngineCore" in " ".join(x.cmdline()))


def check_store(folder: Path) -> None:
    base = model_path()
    store = Store(model_state(folder / "state", base), fingerprint_model(base))
    try:
        assert [x.what for x in check(store) if not x.harmless] == []
    finally:
        store.close()


def test_killed_at_random_points(tmp_path: Path) -> None:
    draw = random.Random(KILLS)
    eep = ("jobs", "start", *EEP)
    with ExitStack() as stack:
        server = stack.enter_context(start(tmp_path, 0))
        unbroken = ask(server, tmp_path, *eep, "--name", "unbroken")["id"]
        while state_of(server, tmp_path, unbroken) not in ("done", "failed"):
            time.sleep(0.5)
        expected = ask(server, tmp_path, "jobs", "show", unbroken)["result"]["digest"]
        words = ["--method", "reap", "--experts", "4", "--data", str(TRAIN), "--dev", str(DEV)]
        first = ask(server, tmp_path, "jobs", "start", *words, "--name", "e4", "--max-rows", "32")
        while state_of(server, tmp_path, first["id"]) not in ("done", "failed"):
            time.sleep(0.5)
        assert liveprune(server, tmp_path / "state", "swap", "e4").returncode == 0
        job = ask(server, tmp_path, *eep, "--name", "broken")["id"]
        killed = restarts = 0
        while killed < KILLS:
            kind = VICTIMS[killed % 3]
            with Load(server.base_url, ["demo"], PROMPTS, streams=1, tokens=TOKENS):
                time.sleep(draw.uniform(0, 4))
                if state_of(server, tmp_path, job) == "done":
                    # Found before all were killed: search anew, from the same seed.
                    name = f"broken-{killed}"
                    assert ask(server, tmp_path, "jobs", "show", job)["result"]["digest"] == (
                        expected
                    )
                    job = ask(server, tmp_path, *eep, "--name", name)["id"]
                    time.sleep(draw.uniform(0, 2))
                found = victim(server, kind, job)
                if found is None:
                    continue
                family = psutil.Process(server.pid).children(recursive=True)
                os.kill(found.pid, signal.SIGKILL)
                killed += 1
                if kind == "worker":
                    continue
                deadline = time.monotonic() + 120
                while server.running and time.monotonic() < deadline:
                    time.sleep(0.2)
                assert not server.running
                # An engine that is left behind would hold the memory that the next one needs.
                _, left = psutil.wait_procs(family, timeout=20)
                assert [x for x in left if x.status() != psutil.STATUS_ZOMBIE] == []
            check_store(tmp_path)
            restarts += 1
            server.stop()
            server = stack.enter_context(start(tmp_path, restarts))
            answer = stream(server.base_url, "demo", PROMPTS[0], TOKENS)
            assert (answer.error, answer.header) == ("", "demo:e4")
        while (state := state_of(server, tmp_path, job)) not in ("done", "failed", "cancelled"):
            time.sleep(0.5)
        assert state == "done", liveprune(server, tmp_path / "state", "jobs", "logs", job).stdout
        assert ask(server, tmp_path, "jobs", "show", job)["result"]["digest"] == expected
        check_store(tmp_path)
        assert server.stop() == 0
