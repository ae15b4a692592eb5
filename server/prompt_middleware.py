"""Shows some of the users' requests and answers to ``kept_prompts``, once they are answered."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from liveprune.patches import admission
from liveprune.server.answer_copy import AnswerCopy, BodyCopy
from liveprune.server.kept_prompts import KeptPrompts, installed
from liveprune.server.prompt_rows import PATHS, row_of

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
        request, answer = BodyCopy(), AnswerCopy()

        async def receiving() -> Message:
            message = await receive()
            request.note(message)
            return message

        async def sending(message: Message) -> None:
            answer.note(message)
            await send(message)

        await self.app(scope, receiving, sending)
        admitted = admission.current()
        whole = request.fits and answer.whole
        if whole and admitted is not None and admitted.counted:
            await _keep(kept, request, answer)


async def _keep(kept: KeptPrompts, request: BodyCopy, answer: AnswerCopy) -> None:
    row = row_of(request.content, answer.content, streamed=answer.streamed)
    if row is None:
        return
    try:
        await asyncio.to_thread(kept.keep, row)
    except OSError as error:
        logger.warning("a prompt could not be kept: %s", error)
