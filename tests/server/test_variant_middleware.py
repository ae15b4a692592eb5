"""A real Starlette application under the middleware, called as uvicorn calls it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from liveprune.patches import admission
from liveprune.patches.admission import Admission
from liveprune.patches.live_types import Served
from liveprune.server.variant_middleware import HEADER, VariantMiddleware

SERVED = Served("org/模型:e4", 1, "s")
QUOTED = "org/%E6%A8%A1%E5%9E%8B:e4"


class OneVariant:
    """Knows one name; counts pins."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def resolve(self, model: str, request: Admission) -> Served | None:
        return SERVED if model == "m" else None

    def counts(self, model: str) -> bool:
        return model == "m"

    def pin(self, served: Served) -> None:
        assert served is SERVED
        self.count["pin"] += 1

    def unpin(self, served: Served) -> None:
        assert served is SERVED
        self.count["unpin"] += 1

    def cards(self) -> list[dict[str, Any]]:
        return []


PINNED = Counter(pin=1)
DONE = Counter(pin=1, unpin=1)


@pytest.fixture
def directory() -> Iterator[OneVariant]:
    made = OneVariant()
    admission.install(made)
    yield made
    admission.install(None)


def answer_with(model: str) -> None:
    """What vLLM's handlers do: check the name, and name the answer after what was found."""
    opened = admission._admission.get()
    assert opened is not None
    opened.answered = opened.admit(model) is not None


async def body(request: Request) -> Response:
    answer_with(request.query_params["model"])
    return JSONResponse({"a": 1}, headers={"x-own": "kept"})


async def stream(request: Request) -> Response:
    answer_with(request.query_params["model"])

    async def chunks() -> AsyncIterator[bytes]:
        opened = admission._admission.get()
        assert opened is not None
        for _ in range(3):
            yield opened.served.name.encode() if opened.served else b"none"
            await asyncio.sleep(0)

    return StreamingResponse(chunks(), headers={"x-own": "kept"})


async def endless(request: Request) -> Response:
    answer_with("m")

    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0)

    return StreamingResponse(chunks())


async def fails(request: Request) -> Response:
    answer_with("m")
    raise RuntimeError("broken")


async def fails_midway(request: Request) -> Response:
    answer_with("m")

    async def chunks() -> AsyncIterator[bytes]:
        yield b"x"
        raise RuntimeError("broken")

    return StreamingResponse(chunks())


async def session(websocket: WebSocket) -> None:
    await websocket.accept()
    answer_with("m")
    await websocket.send_text("hello")
    await websocket.close()


@pytest.fixture
def app() -> Starlette:
    routes = [Route(f"/{f.__name__}", f) for f in (body, stream, endless, fails, fails_midway)]
    return Starlette(routes=[*routes, WebSocketRoute("/session", session)])


Message = dict[str, Any]


class Client:
    """One HTTP request; it disconnects when ``gone`` is set. ``on_send`` sees each message."""

    def __init__(self, path: str, query: str = "model=m", *, version: str = "2.4") -> None:
        self.sent: list[Message] = []
        self.on_send: Callable[[Message], None] = lambda _: None
        self.gone = asyncio.Event()
        self._request = [{"type": "http.request", "body": b"", "more_body": False}]
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": version},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }

    async def receive(self) -> Message:
        if self._request:
            return self._request.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        self.on_send(message)

    async def call(self, app: Any) -> None:
        await VariantMiddleware(app)(self.scope, self.receive, self.send)

    @property
    def headers(self) -> dict[str, str]:
        start = next(m for m in self.sent if m["type"] == "http.response.start")
        return {key.decode(): value.decode() for key, value in start["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)


def call(app: Any, path: str, query: str = "model=m") -> Client:
    async def main() -> Client:
        client = Client(path, query)
        await client.call(app)
        return client

    return asyncio.run(main())


@pytest.mark.parametrize("path", ["/body", "/stream"])
def test_answers_name_their_variant(path: str, app: Starlette, directory: OneVariant) -> None:
    client = call(app, path)
    assert client.headers[HEADER] == QUOTED
    assert client.headers["x-own"] == "kept"
    assert directory.count == DONE


@pytest.mark.parametrize("path", ["/body", "/stream"])
def test_answers_of_no_variant_are_untouched(
    path: str, app: Starlette, directory: OneVariant
) -> None:
    client = call(app, path, "model=other")
    assert HEADER not in client.headers
    assert client.headers["x-own"] == "kept"
    assert directory.count == Counter()


def test_without_a_directory_nothing_is_added(app: Starlette) -> None:
    client = call(app, "/body")
    assert HEADER not in client.headers
    assert client.body == b'{"a":1}'


def test_streams_pass_chunk_by_chunk_while_the_variant_is_pinned(
    app: Starlette, directory: OneVariant
) -> None:
    pins: list[Counter[str]] = []

    async def main() -> Client:
        client = Client("/stream")
        client.on_send = lambda _: pins.append(directory.count.copy())
        await client.call(app)
        return client

    client = asyncio.run(main())
    kinds = [message["type"] for message in client.sent]
    assert kinds == ["http.response.start"] + ["http.response.body"] * 4
    assert [message.get("body") for message in client.sent[1:]] == [
        *[SERVED.name.encode()] * 3,
        b"",
    ]
    assert pins == [PINNED] * 5
    assert directory.count == DONE


def test_middleware_that_runs_the_application_in_another_task(
    app: Starlette, directory: OneVariant
) -> None:
    async def passes(request: Request, call_next: Any) -> Response:
        answer: Response = await call_next(request)
        return answer

    client = call(BaseHTTPMiddleware(app, dispatch=passes), "/stream")
    assert client.headers[HEADER] == QUOTED
    assert client.body == SERVED.name.encode() * 3
    assert directory.count == DONE


@pytest.mark.parametrize("path", ["/fails", "/fails_midway"])
def test_errors_unpin(path: str, app: Starlette, directory: OneVariant) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        call(app, path)
    assert directory.count == DONE


def test_a_client_that_leaves_unpins_by_disconnect_message(
    app: Starlette, directory: OneVariant
) -> None:
    async def main() -> None:
        client = Client("/endless", version="2.3")
        client.on_send = lambda _: client.gone.set() if len(client.sent) == 3 else None
        await client.call(app)

    asyncio.run(main())
    assert directory.count == DONE


def test_a_client_that_leaves_unpins_by_failing_send(app: Starlette, directory: OneVariant) -> None:
    def broken(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise OSError("connection lost")

    async def main() -> None:
        client = Client("/endless")
        client.on_send = broken
        await client.call(app)

    with pytest.raises(ClientDisconnect):
        asyncio.run(main())
    assert directory.count == DONE


def test_cancellation_unpins(app: Starlette, directory: OneVariant) -> None:
    async def main() -> None:
        client = Client("/endless")
        streaming = asyncio.Event()
        client.on_send = lambda _: streaming.set() if len(client.sent) == 3 else None
        task = asyncio.create_task(client.call(app))
        await streaming.wait()
        assert directory.count == PINNED
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert directory.count == DONE


def test_a_websocket_holds_its_variant_and_its_messages_are_untouched(
    app: Starlette, directory: OneVariant
) -> None:
    async def main() -> list[Message]:
        client = Client("/session")
        scope = {**client.scope, "type": "websocket", "scheme": "ws", "subprotocols": []}
        opening = [{"type": "websocket.connect"}]

        async def receive() -> Message:
            return opening.pop()

        await VariantMiddleware(app)(scope, receive, client.send)
        return client.sent

    accepted, hello, closed = asyncio.run(main())
    assert (accepted["type"], accepted["headers"]) == ("websocket.accept", [])
    assert hello["text"] == "hello"
    assert closed["type"] == "websocket.close"
    assert directory.count == DONE


def test_other_scopes_pass_untouched(directory: OneVariant) -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        assert admission._admission.get() is None
        assert (scope, receive, send) == ({"type": "lifespan"}, "receive", "send")

    asyncio.run(VariantMiddleware(inner)({"type": "lifespan"}, "receive", "send"))  # type: ignore[arg-type]
