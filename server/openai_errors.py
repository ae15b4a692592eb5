"""Every error of the public API in OpenAI's shape.

vLLM answers a wrong key with ``{"error": "Unauthorized"}`` and an unknown route with
``{"detail": "Not Found"}``; OpenAI clients expect ``{"error": {"message", "type", "param",
"code"}}``. This ASGI middleware rewrites such bodies and touches nothing else.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_TYPES: dict[int, str] = {
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "BadRequestError",
    422: "UnprocessableEntityError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class OpenAIErrorMiddleware:
    """Reshape JSON error bodies that are not in OpenAI's shape yet."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held: list[Message] = []

        async def reshape(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_json_error(message):
                held.append(message)  # its length is known only once the body is
            elif held:
                held.append(message)
                if not message.get("more_body"):
                    await _send_reshaped(held, send)
            else:
                await send(message)

        await self.app(scope, receive, reshape)


def _is_json_error(start: Message) -> bool:
    headers = MutableHeaders(raw=start["headers"])
    is_json = headers.get("content-type", "").startswith("application/json")
    return int(start["status"]) >= 400 and is_json


async def _send_reshaped(held: list[Message], send: Send) -> None:
    start, *chunks = held
    body = b"".join(chunk.get("body", b"") for chunk in chunks)
    body = json.dumps(openai_error(int(start["status"]), body)).encode()
    headers = MutableHeaders(raw=start["headers"])
    headers["content-length"] = str(len(body))
    await send({**start, "headers": headers.raw})
    await send({"type": "http.response.body", "body": body})


def openai_error(status: int, body: bytes) -> Any:
    """Return the body's JSON in OpenAI's error shape; unchanged where it is already."""
    try:
        content: Any = json.loads(body)
    except ValueError:
        content = body.decode(errors="replace")
    if isinstance(content, dict):
        error = content.get("error")
        if isinstance(error, dict) and "message" in error:
            return content
        content = error or content.get("detail") or content
    message = content if isinstance(content, str) else json.dumps(content)
    kind = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
