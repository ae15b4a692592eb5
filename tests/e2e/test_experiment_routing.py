"""A real server with an experiment on its alias: who is given what, and what is measured of it."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_io import save_plan
from liveprune.server.served_model import ServedModel
from tests.e2e.live_load import metrics

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--block-size", "32"]
FLAGS += [
    "--experiment-interval",
    "1",
    "--gpu-memory-utilization",
    "0.2",
    "--num-gpu-blocks-override",
    "64",
    "--max-num-seqs",
    "1",
]
SHARE = 0.7
EXPERIMENT = {
    "name": "halve",
    "model": "tiny",
    "arms": [
        {"name": "whole", "variant": "full", "weight": SHARE},
        {"name": "pruned", "variant": "a", "weight": 1 - SHARE},
    ],
    "control": "whole",
    "primary": {"metric": "e2e_seconds", "statistic": "p50"},
    "warm_up_seconds": 0,
}
VARIANTS = {"halve/whole": "tiny:full", "halve/pruned": "tiny:a"}
TOKENS = 24
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "abc"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "abc"}]},
}
TOLERANCE = 0.1
"""Seconds between the server's clock and the client's: what passes between two processes on a busy
machine."""
OTHERS = 8
INTERVAL = 1.0
"""Seconds between two looks of the server at its experiments."""
PATIENCE = 60.0
"""Seconds until what was measured can be asked for."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("experiment")
    layers = tuple(LayerPlan(i, 8, 2, kept=(0, 2, 5)) for i in range(3))
    save_plan(Plan("mixtral", 3, layers, Lineage("hand")), made / "a.json")
    return made


@dataclass
class World:
    """The server of now: a test may start it anew."""

    base: Path
    folder: Path
    server: ServedModel | None = None

    def start(self) -> None:
        self.server = ServedModel(
            self.base,
            name="tiny",
            log=self.folder / f"log-{len(list(self.folder.glob('log-*')))}",
            flags=[*FLAGS, f"--variant=a={self.folder / 'a.json'}"],
            state=self.folder / "state",
        )
        self.server.wait_ready()

    def stop(self) -> None:
        assert self.running.stop() == 0

    @property
    def running(self) -> ServedModel:
        assert self.server is not None
        return self.server

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        key = (self.folder / "state" / "admin.key").read_text().splitlines()[0]
        answer = httpx.request(
            method,
            f"{self.running.admin_url}/admin/v1/experiments{path}",
            json=body,
            headers={"Authorization": f"Bearer {key}"},
            timeout=60,
        )
        assert answer.is_success, answer.text
        return answer.json()

    def arms(self) -> dict[str, Any]:
        """By name, as the admin API shows them."""
        return {arm["name"]: arm for arm in self.admin("GET", "/halve")["arms"]}

    def measured(self) -> int:
        """Requests that were measured, in all arms."""
        return sum(arm["requests"] for arm in self.arms().values())

    def settled(self) -> int:
        """Requests that were measured, once all that have ended are written."""
        seen = -1
        while (found := self.measured()) != seen:
            seen = found
            time.sleep(3 * INTERVAL)
        return seen

    def wait_measured(self, requests: int) -> dict[str, Any]:
        """The arms, once so many requests have been measured."""
        deadline = time.monotonic() + PATIENCE
        while self.measured() < requests and time.monotonic() < deadline:
            time.sleep(0.2)
        assert self.measured() == requests
        return self.arms()


@pytest.fixture(scope="module")
def world(tiny_model: Callable[..., Path], folder: Path) -> Iterator[World]:
    made = World(tiny_model("mixtral", num_attention_heads=2, num_key_value_heads=1), folder)
    made.start()
    try:
        made.admin("POST", "", EXPERIMENT)
        yield made
    finally:
        made.running.stop()


@dataclass
class Seen:
    """One answer as its client saw it."""

    arm: str
    variant: str
    model: str
    first: float
    """Seconds until its first text; of a whole answer, until its end."""
    whole: float
    """Seconds until its end."""


class Client:
    """Asks over one connection, and looks at its own clock."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=120)
        self._http.get("/health")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(
        self,
        path: str = "/v1/completions",
        *,
        model: str = "tiny",
        stream: bool = False,
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> Seen:
        body = {"model": model, "max_tokens": TOKENS, "ignore_eos": True, "stream": stream}
        began, first, names = time.monotonic(), 0.0, set()
        with self._http.stream(
            "POST", path, json={**body, **BODIES[path], **fields}, headers=headers
        ) as answer:
            assert answer.status_code == 200, answer.read()
            if not stream:
                names = {json.loads(answer.read())["model"]}
            for line in answer.iter_lines() if stream else ():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                names.add(event["model"])
                first = first or time.monotonic() - began
        whole = time.monotonic() - began
        (name,) = names
        arm, variant = (answer.headers.get(f"x-liveprune-{x}", "") for x in ("arm", "variant"))
        return Seen(arm, variant, name, first or whole, whole)


@pytest.fixture
def client(world: World) -> Iterator[Client]:
    with Client(world.running.base_url) as made:
        yield made


def arm_of(client: Client, unit: str) -> str:
    return client.ask(user=unit, max_tokens=1).arm


def arms_of(client: Client, units: int) -> list[str]:
    return [arm_of(client, f"u{i}") for i in range(units)]


def test_units_get_their_arms_by_their_shares(world: World, client: Client) -> None:
    before, units = world.measured(), 120
    arms = arms_of(client, units)
    counts = Counter(arms)
    assert set(counts) == set(VARIANTS)
    spread = math.sqrt(units * SHARE * (1 - SHARE))
    assert abs(counts["halve/whole"] - SHARE * units) < 5 * spread
    found = world.wait_measured(before + units)
    assert found["pruned"]["units"] == counts["halve/pruned"]
    assert found["whole"]["units"] == counts["halve/whole"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_a_unit_keeps_its_arm_in_every_kind_of_request(
    path: str, stream: bool, client: Client
) -> None:
    expected = arms_of(client, 12)
    found = [client.ask(path, stream=stream, user=f"u{i}", max_tokens=2) for i in range(12)]
    assert [x.arm for x in found] == expected
    assert set(expected) == set(VARIANTS), "both arms are among them"
    for seen in found:
        assert seen.variant == seen.model == VARIANTS[seen.arm]


@pytest.mark.parametrize(
    "headers",
    [
        {"x-liveprune-unit": "{}"},
        {"authorization": "Bearer {}"},
        {"x-api-key": "{}"},
        {"x-request-id": "{}"},
    ],
)
def test_what_may_name_a_unit(headers: dict[str, str], client: Client) -> None:
    def arms() -> list[str]:
        return [
            client.ask(
                headers={key: value.format(f"unit-{i}") for key, value in headers.items()},
                max_tokens=1,
            ).arm
            for i in range(16)
        ]

    first = arms()
    assert first == arms()
    assert set(first) == set(VARIANTS)


def test_pinned_requests_take_no_part(world: World, client: Client) -> None:
    client.ask(user="marker", max_tokens=1)
    before = world.settled()
    for model in ("tiny:full", "tiny:a"):
        for i in range(5):
            seen = client.ask(model=model, user=f"pinned-{i}", max_tokens=1)
            assert (seen.arm, seen.variant) == ("", model)
    client.ask(user="marker", max_tokens=1)
    world.wait_measured(before + 1)


def recorded(world: World, requests: float) -> dict[str, float]:
    """Sums of what the server has recorded of ``tiny:a``, once so many requests are in them."""
    deadline = time.monotonic() + PATIENCE
    labels = '{model="tiny",variant="tiny:a"}'
    while time.monotonic() < deadline:
        found = metrics(world.running.base_url)
        if found.get(f"liveprune_request_duration_seconds_count{labels}", 0.0) >= requests:
            break
        time.sleep(0.05)
    names = {
        "first": "time_to_first_token_seconds_sum",
        "whole": "request_duration_seconds_sum",
        "gap": "inter_token_seconds_sum",
        "count": "request_duration_seconds_count",
    }
    sums = {key: found.get(f"liveprune_{name}{labels}", 0.0) for key, name in names.items()}
    assert sums["count"] >= requests
    return sums


@contextlib.contextmanager
def busy(world: World) -> Iterator[None]:
    """Others wait for the engine's only place: who comes now waits behind them."""
    body = {"model": "tiny:full", "prompt": "abc", "max_tokens": 200, "ignore_eos": True}
    url = f"{world.running.base_url}/v1/completions"
    with httpx.Client(timeout=120) as http, ThreadPoolExecutor(OTHERS) as pool:
        others = [pool.submit(http.post, url, json=body) for _ in range(OTHERS)]
        time.sleep(0.1)  # until they are there
        yield
    assert all(other.result().is_success for other in others)


def test_both_clocks_agree(world: World, client: Client) -> None:
    """Medians of single requests: a busy machine now and then takes its time between the two."""
    unit = next(f"u{i}" for i in range(50) if arm_of(client, f"u{i}") == "halve/pruned")
    tokens, off, firsts = 8, [], []
    before = recorded(world, 0)
    for _ in range(12):
        with busy(world):
            seen = client.ask(stream=True, user=unit, max_tokens=tokens)
        after = recorded(world, before["count"] + 1)
        first, whole, gap = (after[x] - before[x] for x in ("first", "whole", "gap"))
        assert 0 < first < whole
        off.append((first - seen.first, whole - seen.whole, whole - first - gap * (tokens - 1)))
        firsts.append(first)
        before = after
    for differences in zip(*off, strict=True):
        assert statistics.median(differences) == pytest.approx(0, abs=TOLERANCE)
    assert statistics.median(firsts) > 2 * TOLERANCE, "else the test shows nothing"
    found = world.arms()["pruned"]["metrics"]
    assert found["queue_seconds"]["p99"] > TOLERANCE
    assert found["queue_seconds"]["mean"] < found["ttft_seconds"]["mean"]
    assert found["length"]["mean"] == 1


def test_a_restart_moves_nobody(world: World, client: Client) -> None:
    expected = arms_of(client, 30)
    world.stop()
    world.start()
    with Client(world.running.base_url) as fresh:
        assert arms_of(fresh, 30) == expected


def test_requests_are_counted_by_variant(world: World, client: Client) -> None:
    def counted() -> float:
        found = metrics(world.running.base_url)
        return sum(
            value
            for name, value in found.items()
            if name.startswith("liveprune_requests_total{") and 'outcome="ok"' in name
        )

    before = counted()
    client.ask(max_tokens=1)
    client.ask(model="tiny:a", max_tokens=1, stream=True)
    deadline = time.monotonic() + PATIENCE
    while counted() < before + 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert counted() == before + 2
