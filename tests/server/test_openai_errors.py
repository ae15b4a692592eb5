from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from liveprune.server.openai_errors import OpenAIErrorMiddleware, openai_error

SHAPED = {"error": {"message": "no", "type": "X", "param": "model", "code": 404}}


def test_a_body_in_shape_is_left_alone() -> None:
    assert openai_error(404, json.dumps(SHAPED).encode()) == SHAPED


@pytest.mark.parametrize(
    ("status", "body", "message", "kind"),
    [
        (401, b'{"error": "Unauthorized"}', "Unauthorized", "AuthenticationError"),
        (404, b'{"detail": "Not Found"}', "Not Found", "NotFoundError"),
        (405, b'{"detail": "Method Not Allowed"}', "Method Not Allowed", "BadRequestError"),
        (422, b'{"detail": [{"loc": 1}]}', '[{"loc": 1}]', "UnprocessableEntityError"),
        (418, b'{"error": "tea"}', "tea", "BadRequestError"),
        (500, b"not json", "not json", "InternalServerError"),
    ],
)
def test_other_bodies_get_the_shape(status: int, body: bytes, message: str, kind: str) -> None:
    assert openai_error(status, body) == {
        "error": {"message": message, "type": kind, "param": None, "code": status}
    }


@pytest.fixture
def client() -> httpx.AsyncClient:
    app = FastAPI()

    @app.get("/unauthorised")
    async def unauthorised() -> JSONResponse:
        return JSONResponse({"error": "Unauthorized"}, status_code=401)

    @app.get("/shaped")
    async def shaped() -> JSONResponse:
        return JSONResponse(SHAPED, status_code=404)

    @app.get("/plain")
    async def plain() -> PlainTextResponse:
        return PlainTextResponse("down", status_code=503)

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> Any:
            yield b"data: 1\n\n"
            yield b"data: 2\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    wrapped = OpenAIErrorMiddleware(app)
    return httpx.AsyncClient(transport=httpx.ASGITransport(wrapped), base_url="http://t")


def get(client: httpx.AsyncClient, path: str) -> httpx.Response:
    import asyncio

    return asyncio.run(client.get(path))


def test_errors_are_reshaped_with_the_right_length(client: httpx.AsyncClient) -> None:
    for path, status in (("/unauthorised", 401), ("/nowhere", 404)):
        answer = get(client, path)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status
        assert int(answer.headers["content-length"]) == len(answer.content)


def test_everything_else_passes_untouched(client: httpx.AsyncClient) -> None:
    assert get(client, "/shaped").json() == SHAPED
    assert get(client, "/plain").text == "down"
    assert get(client, "/stream").text == "data: 1\n\ndata: 2\n\n"
