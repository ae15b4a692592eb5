"""Requests through vLLM's real front end, measured; only the engine's process is not there."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from liveprune.patches import admission
from liveprune.patches.admission import Admission
from liveprune.patches.live_types import Served
from liveprune.server.experiments.definition import experiment_from
from liveprune.server.experiments.live import Assignment, LiveExperiments, Running
from liveprune.server.experiments.measurements import Measurements
from liveprune.server.measuring import Measured, Measuring
from liveprune.server.request_metrics import RequestMetrics
from liveprune.server.variant_middleware import ARM_HEADER, HEADER
from tests.patches.front_end import (
    E2,
    E4,
    NAME,
    FakeDirectory,
    FrontEnd,
    call_app,
    front_end,
    patch_vllm,
)

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

MESSAGES = [{"role": "user", "content": "a"}]
TEXT: dict[str, Any] = {"prompt": "abc", "max_tokens": 9}
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 9}
ENDPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", TEXT),
    "chat": ("/v1/chat/completions", CHAT),
    "responses": ("/v1/responses", {"input": "a", "max_output_tokens": 9}),
    "messages": ("/v1/messages", {"messages": MESSAGES, "max_tokens": 9}),
}
RUNNING = Running(
    experiment_from(
        {
            "name": "x",
            "model": NAME,
            "arms": [
                {"name": "control", "variant": "e4", "weight": 0.5},
                {"name": "pruned", "variant": "e2", "weight": 0.5},
            ],
            "control": "control",
            "primary": {"metric": "e2e_seconds"},
        }
    ),
    ({"control": 500_000, "pruned": 500_000},),
    0.0,
)


def assignment(variant: str = "e2", shadow: str | None = None) -> Assignment:
    return Assignment("x", "pruned", variant, shadow, phase=0, unit=7, counted=True, fidelity=0.0)


class Assigning(FakeDirectory):
    """Gives every request to the alias the same arm."""

    def __init__(self) -> None:
        super().__init__()
        self.assigned: Assignment | None = assignment()

    def resolve(self, model: str, request: Admission) -> Served | None:
        if model != NAME or self.assigned is None:
            return super().resolve(model, request)
        request.assignment = self.assigned
        return E2


class World:
    """What came of the requests of a test."""

    def __init__(self) -> None:
        self.directory = Assigning()
        self.experiments = LiveExperiments(b"s" * 32, lambda: 1e6)
        self.experiments.install([RUNNING])
        self.metrics = RequestMetrics(lambda _: (1.0, 10.0))
        self.measuring = Measuring(self.experiments, self.metrics)
        self.heard: list[Measured] = []
        self.measuring.listeners.append(self.heard.append)
        self.all: list[Measured] = []
        finished = self.measuring.finished

        def noting(request: Measured) -> None:
            self.all.append(request)
            finished(request)

        self.measuring.finished = noting  # type: ignore[method-assign]

    def mean(self, metric: str, arm: str = "pruned") -> float:
        """Of what the experiment has measured."""
        moments = self._measured.phases[0].cells[arm][metric].moments
        assert moments.count, metric
        return moments.mean

    @property
    def arms(self) -> set[str]:
        """That something was measured of."""
        return set(self._measured.phases[0].cells)

    @property
    def _measured(self) -> Measurements:
        found = self.experiments.measured("x")
        assert found is not None
        return found

    def counter(self, name: str) -> dict[tuple[str, str], float]:
        """(variant, further label) to the value of a counter of Prometheus."""
        return {
            (sample.labels["variant"], value): sample.value
            for family in self.metrics.families(NAME)
            for sample in family.samples
            if sample.name == name
            for key, value in sample.labels.items()
            if key not in ("model", "variant")
        }


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    admission.install(made.directory)
    with made.measuring.running():
        yield made
    admission.install(None)


Test = Callable[[FrontEnd], Awaitable[None]]
Run = Callable[..., None]


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("mixtral", num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, model: Path) -> Run:
    patch_vllm(monkeypatch)

    def runs(test: Test, *flags: str) -> None:
        async def main() -> None:
            async with front_end(model, monkeypatch, *flags) as running:
                await test(running)

        asyncio.run(main())

    return runs


def tokens_of(model: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(found) == text
    return list(found)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_answer_is_measured(endpoint: str, stream: bool, run: Run, world: World) -> None:
    async def test(front: FrontEnd) -> None:
        front.core.steps = [[40], [41], [42, 43]]
        path, body = ENDPOINTS[endpoint]
        answer = await front.post(path, {"model": NAME, "stream": stream, **body})
        assert answer.status_code == 200
        assert (answer.headers[HEADER], answer.headers[ARM_HEADER]) == (E2.name, "x/pruned")
        (found,) = world.all
        assert (found.served, found.outcome, found.assignment) == (
            E2,
            "ok",
            world.directory.assigned,
        )
        (request,) = front.core.requests
        (generation,) = found.generations
        assert list(generation.prompt) == request.prompt_token_ids
        assert list(generation.tokens) == [40, 41, 42, 43]
        assert generation.sampling.extra_args["liveprune"]["slot"] == E2.slot
        assert found.values["prompt_tokens"] == len(request.prompt_token_ids)
        assert found.values["output_tokens"] == 4
        assert (found.values["error"], found.values["length"], found.values["loop"]) == (0, 1, 0)
        assert 0 < found.values["ttft_seconds"] <= found.values["e2e_seconds"] < 60
        assert 0 <= found.values["inter_token_seconds"] < found.values["e2e_seconds"]
        assert "queue_seconds" not in found.values, "--disable-log-stats: no such events"
        assert ids_in(answer.text, endpoint, stream) == {found.response_id}
        assert world.experiments.answers() == {found.response_id: found.assignment}
        assert {name: world.mean(name) for name in found.values} == found.values
        assert world.heard == [found]
        assert front.llm.output_processor.liveprune_sequences == {}

    run(test)


def ids_in(text: str, endpoint: str, stream: bool) -> set[str]:
    """Every id of an answer that a client sees."""
    if not stream:
        return {json.loads(text)["id"]}
    events = [
        json.loads(line.removeprefix("data: "))
        for line in text.splitlines()
        if line.startswith("data: {")
    ]
    if endpoint == "responses":
        return {event["response"]["id"] for event in events if "response" in event}
    if endpoint == "messages":
        return {event["message"]["id"] for event in events if "message" in event}
    return {event["id"] for event in events}


def test_several_sequences_are_one_request(run: Run, world: World) -> None:
    async def test(front: FrontEnd) -> None:
        front.core.steps = [[40], [41]]
        body = {"model": NAME, **TEXT, "prompt": ["abc", "de"], "n": 2}
        await front.post("/v1/completions", body)
        (found,) = world.all
        assert len(found.generations) == len(front.core.requests) == 4
        prompts = [len(r.prompt_token_ids) for r in front.core.requests]
        assert found.values["prompt_tokens"] == sum(prompts) / 2
        assert found.values["output_tokens"] == 8
        assert found.response_id is not None
        assert found.response_id.startswith("cmpl-")
        assert world.counter("liveprune_finish_reasons_total") == {(E2.name, "length"): 4}
        assert world.counter("liveprune_requests_total")[E2.name, "ok"] == 1

    run(test)


def test_a_beam_search_is_timed_and_no_more(run: Run, world: World) -> None:
    async def test(front: FrontEnd) -> None:
        body = {"model": NAME, "prompt": "abc", "use_beam_search": True, "n": 2, "max_tokens": 2}
        assert (await front.post("/v1/completions", body)).status_code == 200
        (found,) = world.all
        assert (set(found.values), found.outcome) == ({"error", "e2e_seconds"}, "ok")
        assert world.counter("liveprune_finish_reasons_total") == {}

    run(test)


def test_requests_outside_of_experiments_are_counted_too(run: Run, world: World) -> None:
    async def test(front: FrontEnd) -> None:
        answer = await front.post("/v1/completions", {"model": E4.name, **TEXT})
        assert ARM_HEADER not in answer.headers
        (found,) = world.all
        assert (found.served, found.assignment, found.outcome) == (E4, None, "ok")
        assert (world.arms, world.heard) == (set(), [])
        assert world.experiments.answers() == {}
        assert world.counter("liveprune_requests_total")[E4.name, "ok"] == 1

    run(test)


def test_the_measures_of_a_shadow_arm_are_its_copys(run: Run, world: World) -> None:
    """The control answers; listeners see it, and the experiment and feedback do not."""
    world.directory.assigned = assignment("e4", shadow="e2")

    async def test(front: FrontEnd) -> None:
        await front.post("/v1/completions", {"model": NAME, **TEXT})
        assert (world.arms, world.experiments.answers()) == (set(), {})
        assert [x.assignment for x in world.heard] == [world.directory.assigned]

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine_is_an_error(stream: bool, run: Run, world: World) -> None:
    async def test(front: FrontEnd) -> None:
        front.core.steps, front.core.finish = [[40], [41]], "error"
        answer = await front.post("/v1/completions", {"model": NAME, "stream": stream, **TEXT})
        assert answer.status_code == (200 if stream else 500)
        (found,) = world.all
        assert (found.outcome, found.values) == ("error", {"error": 1.0})
        assert world.mean("error") == 1
        assert world.heard == []
        assert world.experiments.answers() == {}
        assert world.counter("liveprune_finish_reasons_total") == {(E2.name, "error"): 1}
        assert world.counter("liveprune_requests_total") == {
            (E2.name, "ok"): 0,
            (E2.name, "error"): 1,
            (E2.name, "aborted"): 0,
        }

    run(test)


@pytest.mark.parametrize(
    "body",
    [
        {"model": "unknown", **TEXT},
        {"model": NAME, **TEXT, "prompt": "x" * 500},
        {"model": NAME, **TEXT, "temperature": -1},
    ],
)
def test_a_request_at_fault_is_not_measured(body: Any, run: Run, world: World) -> None:
    async def test(front: FrontEnd) -> None:
        assert 400 <= (await front.post("/v1/completions", body)).status_code < 500
        assert world.all == []
        assert world.counter("liveprune_requests_total") == {}

    run(test)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions/render"])
def test_what_generates_nothing_is_not_measured(path: str, run: Run, world: World) -> None:
    async def test(front: FrontEnd) -> None:
        assert (await front.post(path, {"model": NAME, **CHAT})).status_code == 200
        assert world.all == []

    run(test, "--enable-scale-out")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_no_values(stream: bool, run: Run, world: World) -> None:
    async def test(front: FrontEnd) -> None:
        front.core.answers = False
        gone = asyncio.Event()
        body = json.dumps({"model": NAME, "stream": stream, **TEXT}).encode()
        task = asyncio.create_task(call_app(front.app, "/v1/completions", body, gone))
        await front.core.arrivals.get()
        gone.set()
        await task
        (found,) = world.all
        assert (found.outcome, found.values, found.judgements) == ("aborted", {}, [])
        assert (world.arms, world.heard) == (set(), [])
        assert world.counter("liveprune_requests_total")[E2.name, "aborted"] == 1
        assert world.counter("liveprune_finish_reasons_total") == {(E2.name, "abort"): 1}
        assert front.llm.output_processor.liveprune_sequences == {}

    run(test)


def test_a_request_that_is_cancelled_gives_no_values(run: Run, world: World) -> None:
    async def test(front: FrontEnd) -> None:
        front.core.answers = False
        body = json.dumps({"model": NAME, **TEXT}).encode()
        call = call_app(front.app, "/v1/completions", body, asyncio.Event())
        task = asyncio.create_task(call)
        await front.core.arrivals.get()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert [x.outcome for x in world.all] == ["aborted"]

    run(test)


JSON = {"response_format": {"type": "json_object"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize(("text", "bad"), [('{"a": 1}', 0.0), ('{"a": 1', 1.0)])
def test_json_that_was_asked_for(
    text: str, bad: float, endpoint: str, stream: bool, run: Run, world: World, model: Path
) -> None:
    async def test(front: FrontEnd) -> None:
        front.core.steps = [[token] for token in tokens_of(model, text)]
        front.core.finish = "stop"
        # The last token ends the answer and is no text.
        front.core.steps.append([2])
        path, body = ENDPOINTS[endpoint]
        await front.post(path, {"model": NAME, "stream": stream, **body, **JSON})
        await front.post(path, {"model": NAME, "stream": stream, **body})
        asked, plain = world.all
        assert asked.values["bad_json"] == bad
        assert "bad_json" not in plain.values
        kinds = world.counter("liveprune_degenerate_outputs_total")
        assert kinds[E2.name, "bad_json"] == bad

    run(test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("call", "bad"),
    [
        ('{"name": "f", "arguments": {"x": 1}}', 0.0),
        ('{"name": "g", "arguments": {"x": 1}}', 1.0),
    ],
)
def test_tool_calls_are_read_as_the_client_got_them(
    call: str, bad: float, stream: bool, run: Run, world: World, model: Path
) -> None:
    async def test(front: FrontEnd) -> None:
        said = f"<tool_call>\n{call}\n</tool_call>"
        front.core.steps = [[token] for token in tokens_of(model, said)]
        front.core.finish = "stop"
        front.core.steps.append([2])
        body = {"model": NAME, "stream": stream, **CHAT, "tools": [TOOL], "max_tokens": 90}
        answer = await front.post("/v1/chat/completions", body)
        assert "tool_calls" in answer.text
        (found,) = world.all
        assert found.values["bad_tool_call"] == bad
        assert found.values["empty"] == 0

    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--max-model-len", "256")
    run(test, *flags)


def test_without_anyone_to_measure_nothing_is_followed(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liveprune.server.measuring._installed", None)

    async def test(front: FrontEnd) -> None:
        assert (await front.post("/v1/completions", {"model": NAME, **TEXT})).status_code == 200
        assert not hasattr(front.llm.output_processor, "liveprune_sequences")
        assert world.all == []

    run(test)
