"""Measures each request that generates, and hands it to ``measuring`` after its last byte."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from liveprune.patches import admission
from liveprune.patches.admission import Admission
from liveprune.patches.request_meter import Meter, response_id
from liveprune.server.answer_copy import AnswerCopy, is_stream
from liveprune.server.chat_answers import chat_answers
from liveprune.server.experiments.quality import Answer, Asked
from liveprune.server.measuring import Measured, Measuring, Outcome, installed
from liveprune.server.request_values import Times, asked_in, failed, judged, values_of
from liveprune.server.routing import GENERATING, generates

CHAT = "/v1/chat/completions"
"""Whose answers are read, where they should be JSON or may call tools: the server tells reasoning
and calls apart from the text."""
PLAIN = "/v1/completions"
"""Whose answers are the engine's text."""


class MeasuringMiddleware:
    """ASGI middleware right inside ``VariantMiddleware``."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        measuring, admitted = installed(), admission.current()
        measured = scope["type"] == "http" and scope["path"] in GENERATING
        if measuring is None or admitted is None or not measured:
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})  # the same for all who are given this scope
        admitted.meter = Meter()
        exchange = _Exchange(admitted, receive, send)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            exchange.gone = True
            raise
        except Exception:
            exchange.failed = True
            raise
        finally:
            admitted.meter.close()
            _hand_over(measuring, admitted, exchange)


class _Exchange:
    """What passes between a client and the application."""

    def __init__(self, admitted: Admission, receive: Receive, send: Send) -> None:
        self._admitted, self._receive, self._send = admitted, receive, send
        self.status = 500
        """Of the answer; one that does not come is a failure."""
        self.first: float | None = None
        """When the first part of a stream with a token was sent; seconds."""
        self.ended: float | None = None
        """When the last byte of the answer was sent."""
        self.gone = False
        """The client went before that."""
        self.failed = False
        self.asked = Asked()
        """What can be checked."""
        self.copy: AnswerCopy | None = None
        """Of the answer, where it must be read."""
        self._waits_for_token = False
        """A stream that has had none."""

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and self.ended is None:
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start(message)
        if self.copy is not None:
            self.copy.note(message)
        try:
            await self._send(message)
        except OSError:
            self.gone = True
            raise
        if self._waits_for_token:
            self._look_for_token(message)
        if not message.get("more_body") and message["type"] == "http.response.body":
            self.ended = time.monotonic()

    def _look_for_token(self, message: Message) -> None:
        meter = self._admitted.meter
        if message.get("body") and meter is not None and meter.first is not None:
            self.first, self._waits_for_token = time.monotonic(), False

    def _start(self, message: Message) -> None:
        self.status = message["status"]
        self._waits_for_token = is_stream(message)
        path = self._admitted.scope.get("path")
        if self.status == 200 and path in (CHAT, PLAIN):
            self.asked = asked_in(self._admitted.body)
            if path == CHAT and self.asked != Asked():
                self.copy = AnswerCopy()

    def outcome(self, *, broken: bool) -> Outcome | None:
        """``broken``: a sequence was. None: the request was at fault."""
        if self.gone:
            return "aborted"
        if 400 <= self.status < 500:
            return None
        well = self.status < 400 and self.ended is not None and not self.failed and not broken
        return "ok" if well else "error"


def _choices(copy: AnswerCopy | None) -> list[Answer] | None:
    """What was answered; None: it need not be read, empty: it cannot be."""
    if copy is None:
        return None
    return (chat_answers(copy.content, streamed=copy.streamed) if copy.whole else None) or []


def _hand_over(measuring: Measuring, admitted: Admission, exchange: _Exchange) -> None:
    if admitted.served is None or admitted.meter is None or not generates(admitted):
        return
    # A beam search is many short requests to the engine: none of them is the answer.
    beams = getattr(admitted.body, "use_beam_search", False)
    generations = () if beams else admitted.meter.generations()
    outcome = exchange.outcome(broken=failed(generations))
    if outcome is None:
        return
    values: dict[str, float] = {}
    judgements: list[dict[str, float]] = []
    if outcome == "error":
        values = {"error": 1.0}
    elif outcome == "ok" and exchange.ended is not None:
        judgements = judged(generations, exchange.asked, _choices(exchange.copy))
        first = exchange.first if exchange.first is not None else admitted.meter.first
        values = values_of(Times(admitted.began, first, exchange.ended), generations, judgements)
    measuring.finished(
        Measured(
            admitted.served,
            admitted.assignment,
            outcome,
            values,
            judgements,
            generations,
            response_id(admitted.scope),
        )
    )
