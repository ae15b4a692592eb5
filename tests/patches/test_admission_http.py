"""Every endpoint of vLLM's real front end: which variant reaches the engine, and who is named."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from liveprune.patches import admission
from liveprune.patches.live_types import EXTRA_ARG, Served
from liveprune.server.variant_middleware import HEADER
from tests.patches.front_end import (
    ALIAS_TOO,
    E2,
    E4,
    FULL,
    NAME,
    FakeDirectory,
    FrontEnd,
    call_app,
    front_end,
    patch_vllm,
)

Test = Callable[[FrontEnd], Awaitable[None]]
Run = Callable[..., None]

# vLLM's chat endpoints read a field that they have deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

MESSAGES = [{"role": "user", "content": "a"}]
ONE = {"max_tokens": 1}
ENDPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": "abc", **ONE}),
    "several prompts": ("/v1/completions", {"prompt": ["abc", "de"], **ONE}),
    "n": ("/v1/completions", {"prompt": "abc", "n": 3, **ONE}),
    "n and seed": ("/v1/completions", {"prompt": "abc", "n": 2, "seed": 1, **ONE}),
    "beams": (
        "/v1/completions",
        {"prompt": "abc", "use_beam_search": True, "n": 2, "max_tokens": 2},
    ),
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, **ONE}),
    "chat beams": ("/v1/chat/completions", {"messages": MESSAGES, "use_beam_search": True, **ONE}),
    "batch chat": ("/v1/chat/completions/batch", {"messages": [MESSAGES, MESSAGES], **ONE}),
    "responses": ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
    "messages": ("/v1/messages", {"messages": MESSAGES, **ONE}),
    "tokens": ("/inference/v1/generate", {"token_ids": [40, 41], "sampling_params": ONE}),
    "scoring": (
        "/generative_scoring",
        {"query": "a", "items": ["b", "c"], "label_token_ids": [40]},
    ),
}
STREAMS = {
    "completions": ("/v1/completions", {"prompt": "abc", **ONE}),
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, **ONE}),
    "responses": ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
    "messages": ("/v1/messages", {"messages": MESSAGES, **ONE}),
}


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDirectory]:
    made = FakeDirectory()
    admission.install(made)
    yield made
    admission.install(None)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> Run:
    """Run a test against the front end of a tiny Mixtral."""
    model = tiny_model("mixtral", num_attention_heads=2, num_key_value_heads=1)
    patch_vllm(monkeypatch)

    def runs(test: Test, *flags: str, task: str = "generate") -> None:
        async def main() -> None:
            async with front_end(model, monkeypatch, *flags, task=task) as running:
                await test(running)

        asyncio.run(main())

    return runs


def extra(served: Served, *, alias: bool = False) -> dict[str, Any]:
    """What a request carries; live statistics count those of the alias."""
    counted = {"count": True} if alias else {}
    return {EXTRA_ARG: {**counted, "slot": served.slot, "salt": served.salt}}


def test_every_endpoint_serves_the_variant_that_the_name_stands_for(
    run: Run, directory: FakeDirectory
) -> None:
    async def test(front: FrontEnd) -> None:
        names = {NAME: E4, ALIAS_TOO: E4, E2.name: E2, FULL.name: FULL}
        for endpoint, (path, body) in ENDPOINTS.items():
            for name, served in names.items():
                front.core.requests.clear()
                answer = await front.post(path, {"model": name, **body})
                said = (answer.status_code, answer.json().get("model"), answer.headers.get(HEADER))
                assert said == (200, served.name, served.name), (endpoint, answer.text)
                assert front.core.carried, endpoint
                right = extra(served, alias=name in (NAME, ALIAS_TOO))
                assert all(carried == right for carried in front.core.carried), endpoint
        assert directory.pins == directory.unpins
        assert directory.pins.total() == len(ENDPOINTS) * len(names)

    run(test, "--enable-scale-out")


def test_several_requests_to_the_engine_all_carry_it(run: Run, directory: FakeDirectory) -> None:
    async def test(front: FrontEnd) -> None:
        counts = {"several prompts": 2, "n": 3, "n and seed": 2, "batch chat": 2, "scoring": 2}
        counts["beams"] = 1 + 2  # one for the first token, one for each beam's second
        for endpoint, count in counts.items():
            front.core.requests.clear()
            path, body = ENDPOINTS[endpoint]
            await front.post(path, {"model": E2.name, **body})
            assert front.core.carried == [extra(E2)] * count, endpoint

    run(test)


def test_every_chunk_of_a_stream_names_the_variant(run: Run, directory: FakeDirectory) -> None:
    async def test(front: FrontEnd) -> None:
        for endpoint, (path, body) in STREAMS.items():
            answer = await front.post(path, {"model": NAME, "stream": True, **body})
            assert answer.headers[HEADER] == E4.name, endpoint
            models = list(named_models(answer.text))
            assert models, endpoint
            assert set(models) == {E4.name}, endpoint
        assert directory.pins == directory.unpins == Counter({E4.name: len(STREAMS)})

    run(test)


def named_models(stream: str) -> Iterator[str]:
    """Every ``model`` in the events of a stream, wherever an event has it."""
    for line in stream.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            for place in (event, event.get("response", {}), event.get("message", {})):
                if "model" in place:
                    yield place["model"]


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": ""}])
def test_no_model_is_the_bare_name(
    body: dict[str, Any], run: Run, directory: FakeDirectory
) -> None:
    async def test(front: FrontEnd) -> None:
        answer = await front.post("/v1/completions", {"prompt": "abc", **ONE, **body})
        assert (answer.json()["model"], front.core.carried) == (E4.name, [extra(E4, alias=True)])

    run(test)


@pytest.mark.parametrize("name", ["other", f"{NAME}:e3", f"{NAME}:", f"{NAME.upper()}:e4"])
def test_an_unknown_name_is_vllms_own_404_and_never_the_base(
    name: str, run: Run, directory: FakeDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")

    async def test(front: FrontEnd) -> None:
        for path, body in ENDPOINTS.values():
            answer = await front.post(path, {"model": name, **body})
            assert answer.status_code == 404
            assert HEADER not in answer.headers
            if path != "/v1/messages":  # Anthropic's shape
                error = answer.json()["error"]
                assert error["message"].startswith(f"The model `{name}` does not exist.")
                assert (error["type"], error["param"]) == ("NotFoundError", "model")
        assert front.core.requests == []
        assert directory.pins.total() == 0

    run(test, "--enable-scale-out")


def test_sagemaker_names_the_variant_in_its_header(run: Run, directory: FakeDirectory) -> None:
    """SageMaker's own layer puts this header in the place of the body's model."""

    async def test(front: FrontEnd) -> None:
        for name, status in ((E2.name, 200), ("other", 404)):
            headers = {"x-amzn-sagemaker-adapter-identifier": name}
            body = {"prompt": "abc", **ONE}
            answer = await front.client.post("/invocations", json=body, headers=headers)
            assert answer.status_code == status
        assert front.core.carried == [extra(E2)]
        assert directory.unpins == Counter({E2.name: 1})

    run(test)


def test_the_alias_may_move_in_the_middle_of_a_request(run: Run, directory: FakeDirectory) -> None:
    """Chat checks the name, renders, and looks the name up again."""

    async def test(front: FrontEnd) -> None:
        render = front.state.openai_serving_chat.online_renderer.render_chat

        async def render_chat(request: Any) -> Any:
            directory.alias = E2
            return await render(request)

        front.state.openai_serving_chat.online_renderer.render_chat = render_chat
        path, body = ENDPOINTS["chat"]
        answer = await front.post(path, {"model": NAME, **body})
        assert (answer.json()["model"], front.core.carried) == (E4.name, [extra(E4, alias=True)])
        assert directory.pins == directory.unpins == Counter({E4.name: 1})
        answer = await front.post(path, {"model": NAME, **body})
        assert answer.json()["model"] == E2.name

    run(test)


FORGED = {"slot": 5, "salt": "x"}
FORGERIES = {
    "completions": {"vllm_xargs": {EXTRA_ARG: "5", "own": 1}},
    "chat": {"vllm_xargs": {EXTRA_ARG: "5", "own": 1}},
    "responses": {"vllm_xargs": {EXTRA_ARG: "5", "own": 1}},
    "messages": {"vllm_xargs": {EXTRA_ARG: "5", "own": 1}},
    "tokens": {"sampling_params": {**ONE, "extra_args": {EXTRA_ARG: FORGED, "own": 1}}},
}


@pytest.mark.parametrize("served", [FULL, E4, None])
def test_what_clients_forge_never_reaches_the_engine(served: Served | None, run: Run) -> None:
    admission.install(FakeDirectory() if served else None)

    async def test(front: FrontEnd) -> None:
        for endpoint, forgery in FORGERIES.items():
            path, body = ENDPOINTS[endpoint]
            front.core.requests.clear()
            model = served.name if served else NAME
            answer = await front.post(path, {"model": model, **body, **forgery})
            assert answer.status_code == 200, answer.text
            expected = {"own": 1, **(extra(served) if served else {})}
            assert front.core.carried == [expected], endpoint

    try:
        run(test, "--enable-scale-out")
    finally:
        admission.install(None)


def test_without_a_directory_everything_is_vllms_own(run: Run) -> None:
    async def test(front: FrontEnd) -> None:
        for path, body in ENDPOINTS.values():
            front.core.requests.clear()
            answer = await front.post(path, {"model": ALIAS_TOO, **body})
            assert answer.json()["model"] == NAME
            assert HEADER not in answer.headers
            # Stock vLLM gives the responses endpoint an empty dictionary.
            assert all(not carried for carried in front.core.carried)
        answer = await front.post("/v1/completions", {"model": E4.name, "prompt": "abc"})
        assert answer.status_code == 404

    run(test, "--enable-scale-out")


def test_endpoints_that_ask_no_engine_need_a_known_name_and_claim_no_variant(
    run: Run, directory: FakeDirectory
) -> None:
    async def test(front: FrontEnd) -> None:
        for name, status in ((NAME, 200), (E2.name, 200), ("other", 404)):
            for path in ("/tokenize", "/v1/completions/render"):
                answer = await front.post(path, {"model": name, "prompt": "abc"})
                assert answer.status_code == status
                assert HEADER not in answer.headers
        assert directory.pins == directory.unpins

    run(test, "--enable-scale-out")


def test_embeddings_of_a_variant_are_refused(run: Run, directory: FakeDirectory) -> None:
    async def test(front: FrontEnd) -> None:
        for path, body in (("/v1/embeddings", {"input": "abc"}), ("/pooling", {"input": "abc"})):
            answer = await front.post(path, {"model": NAME, **body})
            assert answer.status_code == 400, path
            error = answer.json()["error"]
            assert (error["type"], error["param"]) == ("BadRequestError", "model")
            assert f"`{E4.name}` generates text only" in error["message"]
            assert f"`{FULL.name}`" in error["message"]
            assert (await front.post(path, {"model": "x:y", **body})).status_code == 404
        assert front.core.requests == []
        assert directory.pins == directory.unpins == Counter({E4.name: 2})

    run(test, "--runner", "pooling", "--convert", "embed", task="embed")


def test_a_background_response_keeps_its_variant_until_it_is_done(
    run: Run, directory: FakeDirectory
) -> None:
    async def test(front: FrontEnd) -> None:
        front.state.openai_serving_responses.enable_store = True
        front.core.answers = False
        path, body = ENDPOINTS["responses"]
        answer = await front.post(path, {"model": NAME, "background": True, **body})
        assert (answer.json()["status"], answer.json()["model"]) == ("queued", E4.name)
        assert directory.held == Counter({E4.name: 1})
        (task,) = front.state.openai_serving_responses.background_tasks.values()
        request = await front.core.arrivals.get()
        assert front.core.carried == [extra(E4, alias=True)]
        front.core.answer(request)
        await task
        await asyncio.sleep(0)  # callbacks of the task
        assert directory.pins == directory.unpins == Counter({E4.name: 1})

    run(test)


def test_a_client_that_leaves_frees_its_variant(run: Run, directory: FakeDirectory) -> None:
    async def test(front: FrontEnd) -> None:
        front.core.answers = False
        for stream in (False, True):
            gone = asyncio.Event()
            body = json.dumps({"model": NAME, "prompt": "abc", "stream": stream}).encode()
            call = asyncio.create_task(call_app(front.app, "/v1/completions", body, gone))
            request = await front.core.arrivals.get()
            assert directory.held == Counter({E4.name: 1})
            gone.set()
            await call
            assert not directory.held
            assert await front.core.aborts.get() == [request.request_id]
        assert directory.unpins == Counter({E4.name: 2})

    run(test)
