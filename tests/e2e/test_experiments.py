"""Experiments under users' traffic: one that ships and is rolled back, a bad variant that is rolled
back by itself, and a shadow that nobody hears of.

Users are simulated with the openai client; each scores its answer over the feedback API.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from liveprune.pruning.demo import model_path, rows_path
from liveprune.pruning.plan_io import save_plan
from liveprune.pruning.prune import make_plan
from liveprune.server.experiments.decision import replay
from liveprune.server.served_model import ServedModel
from tests.e2e.live_load import json_of, liveprune, metrics

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256"]
FLAGS += ["--gpu-memory-utilization", "0.2", "--block-size", "32", "--max-num-seqs", "16"]
FLAGS += ["--num-gpu-blocks-override", "128", "--experiment-interval", "1"]
FLAGS += ["--no-live-statistics"]
TOKENS = 16
MOST = 4000
"""Requests after which an experiment must have ended."""
BATCH = 200
USERS = 400
AT_ONCE = 8
TOLERANCE = 0.05
"""Seconds: a few requests are in one mean and not in the other."""
ROWS = [json.loads(line) for line in rows_path("sort", "dev").read_text().splitlines()]

Run = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Answer:
    """What a user got."""

    user: str
    arm: str
    variant: str
    text: str
    seconds: float
    id: str
    right: bool


@dataclass
class World:
    """A server, and users of it."""

    server: ServedModel
    state: Path
    folder: Path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return liveprune(self.server, self.state, *words)

    def json(self, *words: str) -> Any:
        return json_of(self.run(*words, "--json"))

    def add(self, tag: str, **plan: Any) -> None:
        made = make_plan(model_path(), calibration=rows_path("sort", "train"), max_rows=64, **plan)
        save_plan(made, self.folder / f"{tag}.json")
        done = self.run("variants", "add", str(self.folder / f"{tag}.json"), "--name", tag)
        assert done.returncode == 0, done.stderr + done.stdout

    def start(self, **definition: Any) -> None:
        path = self.folder / f"{definition['name']}.json"
        path.write_text(json.dumps({"model": "demo", "warm_up_seconds": 0, **definition}))
        done = self.run("experiments", "start", str(path))
        assert done.returncode == 0, done.stderr + done.stdout

    def state_of(self, name: str) -> str:
        return str(self.json("experiments", "show", name)["state"])

    def ask(self, numbers: Sequence[int], *, score: bool = True) -> list[Answer]:
        """One request of each of these users, some at once."""
        return asyncio.run(self._ask(numbers, score))

    async def _ask(self, numbers: Sequence[int], score: bool) -> list[Answer]:
        places = asyncio.Semaphore(AT_ONCE)
        key = (self.state / "admin.key").read_text().split()[0]
        async with (
            openai.AsyncOpenAI(base_url=f"{self.server.base_url}/v1", api_key="none") as client,
            httpx.AsyncClient(
                base_url=self.server.admin_url,
                headers={"Authorization": f"Bearer {key}"},
                timeout=120,
            ) as admin,
        ):

            async def one(number: int) -> Answer:
                async with places:
                    found = await _one(client, number)
                    if score:
                        body = {"response_id": found.id, "score": float(found.right)}
                        told = await admin.post("/admin/v1/feedback", json=body)
                        # Its experiment may have ended meanwhile, or it is in none.
                        assert told.status_code in (200, 404, 409), told.text
                    return found

            return list(await asyncio.gather(*(one(number) for number in numbers)))


async def _one(client: openai.AsyncOpenAI, number: int) -> Answer:
    row = ROWS[number % len(ROWS)]
    begun = time.monotonic()
    raw = await client.completions.with_raw_response.create(
        model="demo",
        prompt=row["prompt"],
        max_tokens=TOKENS,
        temperature=0,
        extra_headers={"x-liveprune-unit": f"user-{number}"},
    )
    answer = raw.parse()
    return Answer(
        user=f"user-{number}",
        arm=raw.headers.get("x-liveprune-arm", ""),
        variant=raw.headers["x-liveprune-variant"],
        text=answer.choices[0].text,
        seconds=time.monotonic() - begun,
        id=answer.id,
        right=answer.choices[0].text.strip() == row["answer"].strip(),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("experiments")
    with ServedModel(
        model_path(),
        name="demo",
        log=folder / "log",
        flags=[*FLAGS, "--plan-root", str(folder)],
        state=folder / "state",
    ) as server:
        server.wait_ready()
        made = World(server, folder / "state", folder)
        made.add("e4", method="reap", experts=4)
        made.add("bad", method="random", experts=2, top_k=1, seed=3)
        yield made
        assert server.stop() == 0


def arms(treatment: str, share: float, **more: Any) -> dict[str, Any]:
    return {
        "arms": [
            {"name": "full", "variant": "full", "weight": 1 - share},
            {"name": "pruned", "variant": treatment, "weight": share, **more},
        ],
        "control": "full",
    }


def check_replays(world: World, name: str) -> list[str]:
    """The verdicts; each follows from its record."""
    found = []
    for decision in world.json("experiments", "decisions", name):
        key = (world.state / "admin.key").read_text().split()[0]
        answer = httpx.get(
            f"{world.server.admin_url}/admin/v1/experiments/{name}/decisions/{decision['id']}",
            headers={"Authorization": f"Bearer {key}"},
        ).json()
        again = replay(answer["record"])
        assert (again.verdict, list(again.reasons)) == (decision["verdict"], decision["reasons"])
        found.append(again.verdict)
    return found


def test_a_pruned_variant_is_ramped_shipped_and_rolled_back(world: World) -> None:
    world.start(
        name="halve",
        **arms("e4", 0.1),
        guardrails=[
            {"metric": "score", "margin": 0.1},
            {"metric": "loop", "margin": 0.1},
            {"metric": "error", "margin": 0.1},
            {"metric": "agreement", "margin": 0.3},
        ],
        fidelity=0.5,
        ramp=[0.5],
        minimum_units=50,
        rollback_units=30,
        minimum_seconds=3,
        cool_down_seconds=0,
        actions=["notify", "rollback", "ramp", "promote"],
    )
    answers: list[Answer] = []
    seen: dict[str, list[str]] = {}
    while world.state_of("halve") == "running" and len(answers) < MOST:
        # The same users come again: a ramp must take nobody off the growing arm.
        for answer in world.ask([len(answers) % USERS + i for i in range(BATCH)]):
            answers.append(answer)
            seen.setdefault(answer.user, []).append(answer.arm)
    shown = world.json("experiments", "show", "halve")
    assert shown["state"] == "shipped", world.run("experiments", "show", "halve").stdout
    assert shown["decision"]["mismatch_p"] > 0.001
    verdicts = check_replays(world, "halve")
    assert verdicts[-1] == "SHIP"
    assert set(verdicts) == {"HOLD", "SHIP"}
    for x in answers:
        expected = {"halve/full": "demo:full", "halve/pruned": "demo:e4"}
        # Once it had ended, the name means the winner.
        assert x.variant == expected.get(x.arm, x.variant)
    for found in seen.values():
        order = [arm for arm in found if arm]
        assert order == sorted(order, key=["halve/full", "halve/pruned"].index)
    moved = [arms for arms in seen.values() if len({arm for arm in arms if arm}) == 2]
    assert moved, "the ramp moved some users to the pruned variant"
    # What was measured is what the clients saw.
    by_arm = {arm["name"]: arm for arm in shown["arms"]}
    for name, arm in by_arm.items():
        mine = [x for x in answers if x.arm == f"halve/{name}"]
        assert arm["requests"] <= len(mine)
        assert arm["requests"] >= 0.9 * len(mine), "all but those after the end are counted"
        mean = statistics.fmean(x.seconds for x in mine)
        # The clients' time has their own queue in it, on a machine that they share with the server.
        assert 0.5 * mean < arm["metrics"]["e2e_seconds"]["mean"] < mean + TOLERANCE
        rate = statistics.fmean(x.right for x in mine)
        assert arm["metrics"]["score"]["mean"] == pytest.approx(rate, abs=0.05)
    assert by_arm["full"]["metrics"]["agreement"]["mean"] == 1.0
    assert 0.7 < by_arm["pruned"]["metrics"]["agreement"]["mean"] < 1.0
    deadline = time.monotonic() + 60
    while not _is_alias(world, "e4") and time.monotonic() < deadline:
        time.sleep(0.5)
    assert _is_alias(world, "e4"), "the winner is swapped to"
    assert {x.variant for x in world.ask(range(4), score=False)} == {"demo:e4"}
    assert world.run("rollback").returncode == 0
    assert {x.variant for x in world.ask(range(4), score=False)} == {"demo:full"}


def _is_alias(world: World, tag: str) -> bool:
    return bool({x["tag"]: x for x in world.json("variants", "list")}[tag]["is_alias"])


def test_a_bad_variant_is_rolled_back_by_itself(world: World) -> None:
    world.start(
        name="bad",
        **arms("bad", 0.3),
        guardrails=[{"metric": "score", "margin": 0.05}],
        rollback_units=30,
        actions=["notify", "rollback"],
    )
    refused = world.run("variants", "remove", "bad")
    assert refused.returncode != 0
    assert "bad" in refused.stderr
    asked = 0
    while world.state_of("bad") == "running" and asked < MOST:
        world.ask(range(asked, asked + BATCH))
        asked += BATCH
    shown = world.json("experiments", "show", "bad")
    assert shown["state"] == "rolled_back"
    assert check_replays(world, "bad")[-1] == "ROLLBACK"
    assert "score: worse" in world.run("experiments", "show", "bad").stdout
    after = world.ask(range(40), score=False)
    assert {(x.arm, x.variant) for x in after} == {("", "demo:full")}
    series = [name for name in metrics(world.server.admin_url) if 'experiment="bad"' in name]
    assert series == [], "an experiment that has ended has no series"


def test_nobody_hears_of_a_shadow(world: World) -> None:
    world.start(
        name="mirror",
        **arms("bad", 0.5, shadow=True),
        guardrails=[{"metric": "agreement", "margin": 0.05}],
        fidelity=1.0,
        actions=["notify"],
    )
    answers = world.ask(range(60), score=False)
    assert {x.variant for x in answers} == {"demo:full"}
    pinned = {row["prompt"]: _pinned(world, row["prompt"]) for row in ROWS[:60]}
    for number, answer in enumerate(answers):
        assert answer.text == pinned[ROWS[number % len(ROWS)]["prompt"]]
    mirrored = sum(x.arm == "mirror/pruned" for x in answers)
    assert 15 < mirrored < 45
    deadline = time.monotonic() + 120
    while (arm := _arm(world, "mirror", "pruned"))["requests"] < mirrored:
        assert time.monotonic() < deadline, arm
        time.sleep(1)
    assert _arm(world, "mirror", "pruned")["metrics"]["error"]["mean"] == 0.0
    while "agreement" not in (arm := _arm(world, "mirror", "pruned"))["metrics"]:
        assert time.monotonic() < deadline, arm
        time.sleep(1)
    assert arm["metrics"]["agreement"]["mean"] < 0.95
    assert world.run("experiments", "stop", "mirror").returncode == 0
    assert world.state_of("mirror") == "stopped"


def _arm(world: World, name: str, arm: str) -> dict[str, Any]:
    shown = world.json("experiments", "show", name)
    return next(x for x in shown["arms"] if x["name"] == arm)


def _pinned(world: World, prompt: str) -> str:
    body = {"model": "demo:full", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    answer = httpx.post(f"{world.server.base_url}/v1/completions", json=body, timeout=120)
    assert "x-liveprune-arm" not in answer.headers
    return str(answer.json()["choices"][0]["text"])
