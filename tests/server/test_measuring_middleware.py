"""Times and ends of a request, over an application and an engine that a test makes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from liveprune.patches import admission
from liveprune.patches.admission import Admission
from liveprune.patches.live_types import Served
from liveprune.patches.request_meter import note_step
from liveprune.server.answer_copy import MOST_BYTES
from liveprune.server.experiments.live import LiveExperiments
from liveprune.server.measuring import Measured, Measuring
from liveprune.server.measuring_middleware import MeasuringMiddleware
from liveprune.server.request_metrics import RequestMetrics
from liveprune.server.variant_middleware import VariantMiddleware

SERVED = Served("m:a", 1, "s")
Message = dict[str, Any]
App = Callable[[Any, Any, "Send"], Awaitable[None]]
Send = Callable[[Message], Awaitable[None]]


class Directory:
    def resolve(self, model: str, request: Admission) -> Served | None:
        return SERVED

    def counts(self, model: str) -> bool:
        return True

    def pin(self, served: Served) -> None: ...

    def unpin(self, served: Served) -> None: ...

    def cards(self) -> list[dict[str, Any]]:
        return []


class World:
    """A clock that tests set, an engine that gives tokens when told, and what was measured."""

    def __init__(self) -> None:
        self.now = 0.0
        self.measured: list[Measured] = []
        self.processor = SimpleNamespace(request_states={}, liveprune_sequences={})

    def admit(self) -> Admission:
        found = admission.current()
        assert found is not None
        found.body = SimpleNamespace()
        found.admit("m")
        return found

    def generate(self, *, finish: str | None = "stop") -> None:
        """Ask the engine for a sequence of the request."""
        found = self.admit()
        self.processor.request_states["r"] = SimpleNamespace(
            external_req_id="r",
            prompt_token_ids=[1, 2],
            prompt_len=2,
            detokenizer=SimpleNamespace(output_token_ids=[7, 8, 9], output_text="abc"),
            stats=None,
        )
        assert found.meter is not None
        found.meter.tie(self.processor, SimpleNamespace(request_id="r", sampling_params=None))
        self.processor.liveprune_sequences["r"].finish = finish

    def token(self) -> None:
        note_step(self.processor, [SimpleNamespace(request_id="r", new_token_ids=[7])])

    def call(
        self,
        app: App,
        *,
        send: Send | None = None,
        path: str = "/v1/completions",
        gone: bool = False,
    ) -> list[Message]:
        """Send a request as a server does, which adds nothing of its own to ``scope``."""
        sent: list[Message] = []

        async def keep(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.disconnect"} if gone else {"type": "http.request", "body": b""}

        measured = VariantMiddleware(MeasuringMiddleware(app))  # type: ignore[arg-type]
        scope = {"type": "http", "path": path, "headers": []}
        asyncio.run(measured(scope, receive, send or keep))  # type: ignore[arg-type]
        return sent


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()
    monkeypatch.setattr("time.monotonic", lambda: made.now)
    measuring = Measuring(LiveExperiments(b"s", lambda: 0), RequestMetrics(lambda _: (1.0,)))
    monkeypatch.setattr(measuring, "finished", made.measured.append)
    admission.install(Directory())
    with measuring.running():
        yield made
    admission.install(None)


def start(status: int = 200, kind: str = "text/event-stream") -> Message:
    headers = [(b"content-type", kind.encode())]
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(content: bytes = b"x", *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


def test_times_of_a_stream(world: World) -> None:
    async def app(scope: Any, receive: Any, send: Send) -> None:
        world.generate()
        world.now = 1.0
        await send(start())
        await send(body(b": keep-alive"))
        world.now = 2.0
        world.token()
        world.now = 2.5
        await send(body(b""))  # nothing yet
        world.now = 3.0
        await send(body())
        world.now = 6.0
        world.token()
        world.now = 7.0
        await send(body())
        world.now = 8.0
        await send(body(b"", more=False))
        world.now = 9.0

    sent = world.call(app)
    assert [x["type"].rpartition(".")[2] for x in sent] == ["start"] + ["body"] * 5
    (found,) = world.measured
    assert found.outcome == "ok"
    assert {k: found.values[k] for k in ("ttft_seconds", "e2e_seconds", "inter_token_seconds")} == {
        "ttft_seconds": 3.0,
        "e2e_seconds": 8.0,
        "inter_token_seconds": (6 - 2) / 2,
    }


def test_the_first_token_of_a_whole_answer_is_the_engines(world: World) -> None:
    async def app(scope: Any, receive: Any, send: Send) -> None:
        world.generate()
        world.now = 2.0
        world.token()
        world.now = 5.0
        await send(start(kind="application/json"))
        await send(body(b"{}", more=False))

    world.call(app)
    (found,) = world.measured
    assert (found.values["ttft_seconds"], found.values["e2e_seconds"]) == (2.0, 5.0)


def test_a_slow_client_is_waited_for(world: World) -> None:
    async def slow(message: Message) -> None:
        world.now += 1.0

    async def app(scope: Any, receive: Any, send: Send) -> None:
        world.generate()
        world.token()
        await send(start())
        await send(body())
        await send(body(more=False))

    world.call(app, send=slow)
    (found,) = world.measured
    assert (found.values["ttft_seconds"], found.values["e2e_seconds"]) == (2.0, 3.0)


def test_a_send_that_fails_is_a_client_that_left(world: World) -> None:
    async def broken(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise OSError("connection lost")

    async def app(scope: Any, receive: Any, send: Send) -> None:
        world.generate()
        await send(start())
        await send(body())

    with pytest.raises(OSError, match="connection lost"):
        world.call(app, send=broken)
    assert [(x.outcome, x.values) for x in world.measured] == [("aborted", {})]


@pytest.mark.parametrize("begun", [False, True])
def test_an_application_that_fails_is_an_error(begun: bool, world: World) -> None:
    async def app(scope: Any, receive: Any, send: Send) -> None:
        world.generate()
        if begun:
            await send(start())
            await send(body(more=False))
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        world.call(app)
    assert [(x.outcome, x.values) for x in world.measured] == [("error", {"error": 1.0})]


@pytest.mark.parametrize(
    ("status", "finish", "outcomes"),
    [
        (200, "stop", ["ok"]),
        (200, "error", ["error"]),
        (200, None, ["error"]),
        (500, "stop", ["error"]),
        (503, "stop", ["error"]),
        (400, "stop", []),
        (429, None, []),
    ],
)
def test_how_a_request_ended(
    status: int, finish: str | None, outcomes: list[str], world: World
) -> None:
    async def app(scope: Any, receive: Any, send: Send) -> None:
        world.generate(finish=finish)
        await send(start(status, "application/json"))
        await send(body(b"{}", more=False))

    world.call(app)
    assert [x.outcome for x in world.measured] == outcomes


def test_an_answer_without_an_end_is_an_error(world: World) -> None:
    async def app(scope: Any, receive: Any, send: Send) -> None:
        world.generate()
        await send(start())
        await send(body())

    world.call(app)
    assert [x.outcome for x in world.measured] == ["error"]


@pytest.mark.parametrize(("before", "outcome"), [(True, "aborted"), (False, "ok")])
def test_a_client_that_hangs_up_after_the_answer_has_it(
    before: bool, outcome: str, world: World
) -> None:
    async def app(scope: Any, receive: Any, send: Send) -> None:
        world.generate()
        if before:
            await receive()
        await send(start())
        await send(body(more=False))
        await receive()

    world.call(app, gone=True)
    assert [x.outcome for x in world.measured] == [outcome]


class Form(BaseModel):
    response_format: dict[str, str] = {"type": "json_object"}


def answer(content: str) -> bytes:
    choice = {"index": 0, "message": {"content": content}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize(
    ("path", "said", "bad"),
    [
        ("/v1/completions", b"", 1.0),  # the engine's own text, which is no JSON
        ("/v1/chat/completions", answer("{}"), 0.0),
        ("/v1/chat/completions", answer("{"), 1.0),
        ("/v1/chat/completions", b"unreadable", None),
        ("/v1/chat/completions", answer("{" + " " * MOST_BYTES), None),
        ("/v1/messages", answer("{"), None),
    ],
)
def test_json_is_judged_where_it_can_be_read(
    path: str, said: bytes, bad: float | None, world: World
) -> None:
    async def app(scope: Any, receive: Any, send: Send) -> None:
        world.generate()
        found = admission.current()
        assert found is not None
        found.body = Form()
        await send(start(kind="application/json"))
        await send(body(said, more=False))

    world.call(app, path=path)
    (measured,) = world.measured
    assert measured.values.get("bad_json") == bad


@pytest.mark.parametrize("path", ["/tokenize", "/v1/models"])
def test_other_paths_are_left_alone(path: str, world: World) -> None:
    async def app(scope: Any, receive: Any, send: Send) -> None:
        assert world.admit().meter is None
        await send(start())
        await send(body(more=False))

    world.call(app, path=path)
    assert world.measured == []


def test_a_background_response_is_not_measured(world: World) -> None:
    async def app(scope: Any, receive: Any, send: Send) -> None:
        world.generate(finish=None)
        found = admission.current()
        assert found is not None
        found.body.background = True
        await send(start(kind="application/json"))
        await send(body(b"{}", more=False))

    world.call(app, path="/v1/responses")
    assert world.measured == []
