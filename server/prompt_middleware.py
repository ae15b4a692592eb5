"""Shows some of the users' requests and answers to ``kept_prompts``, once they are answered."""

from __future__ import annotations

import asyncio
import logging

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from liveprune.patches import admission
from liveprune.server.kept_prompts import LONGEST, KeptPrompts, installed
from liveprune.server.prompt_rows import PATHS, row_of

MOST_BYTES = 16 * LONGEST
"""Of a request or an answer: a stream has many bytes for one of its text."""

logger = logging.getLogger("liveprune.prompts")


class PromptMiddleware:
    """ASGI middleware inside ``VariantMiddleware``; nothing is copied of what is not drawn."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kept = installed()
        drawn = kept is not None and scope["type"] == "http" and scope["path"] in PATHS
        if kept is None or not drawn or not kept.draw():
            await self.app(scope, receive, send)
            return
        copy = _Copy(receive, send)
        await self.app(scope, copy.receive, copy.send)
        admitted = admission.current()
        if copy.whole and admitted is not None and admitted.counted:
            await _keep(kept, copy)


class _Copy:
    """What passes in both directions, up to a bound."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.request, self.answer = bytearray(), bytearray()
        self.streamed = False
        self._succeeded = self._ended = False

    @property
    def whole(self) -> bool:
        """A success, answered to its end, and not too long."""
        longest = max(len(self.request), len(self.answer))
        return self._succeeded and self._ended and longest <= MOST_BYTES

    async def receive(self) -> Message:
        message = await self._receive()
        self._add(self.request, message)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=message.get("headers", [])).get("content-type", "")
            self._succeeded = message["status"] == 200
            self.streamed = kind.startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self._add(self.answer, message)
            self._ended = not message.get("more_body", False)
        await self._send(message)

    @staticmethod
    def _add(part: bytearray, message: Message) -> None:
        if len(part) <= MOST_BYTES:
            part.extend(message.get("body", b""))


async def _keep(kept: KeptPrompts, copy: _Copy) -> None:
    row = row_of(bytes(copy.request), bytes(copy.answer), streamed=copy.streamed)
    if row is None:
        return
    try:
        await asyncio.to_thread(kept.keep, row)
    except OSError as error:
        logger.warning("a prompt could not be kept: %s", error)
