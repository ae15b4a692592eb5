"""A copy of what an HTTP request is answered, for those who look at answers afterwards."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message

MOST_BYTES = 1 << 22
"""Of a request or an answer: a stream has many bytes for one of its text."""


class BodyCopy:
    """The body of a request or an answer, up to a bound."""

    def __init__(self) -> None:
        self._content = bytearray()

    @property
    def content(self) -> bytes:
        return bytes(self._content)

    @property
    def fits(self) -> bool:
        """No part of what has passed is missing."""
        return len(self._content) <= MOST_BYTES

    def note(self, message: Message) -> None:
        """Take in an ASGI message of the body."""
        if self.fits:
            self._content.extend(message.get("body", b""))


class AnswerCopy(BodyCopy):
    """An answer; show it each message from the first on."""

    def __init__(self) -> None:
        super().__init__()
        self.streamed = False
        """As events."""
        self._succeeded = self._ended = False

    @property
    def whole(self) -> bool:
        """A success, answered to its end, and not too long."""
        return self._succeeded and self._ended and self.fits

    def note(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._succeeded = message["status"] == 200
            self.streamed = is_stream(message)
        elif message["type"] == "http.response.body":
            super().note(message)
            self._ended = not message.get("more_body", False)


def is_stream(start: Message) -> bool:
    """Whether an answer that starts so is a stream of events."""
    kind = Headers(raw=start.get("headers", [])).get("content-type", "")
    return kind.startswith("text/event-stream")


def events(stream: bytes) -> list[Any]:
    """The JSON of all events of an OpenAI stream.

    Raises:
        ValueError: it was cut off, or an event is not JSON.
    """
    found = [
        line.removeprefix("data:").strip()
        for line in stream.decode().splitlines()
        if line.startswith("data:")
    ]
    if not found or found[-1] != "[DONE]":
        raise ValueError("the stream did not end")
    return [json.loads(event) for event in found[:-1]]
