"""Each HTTP request holds its variant until its response has ended, and says which one it was."""

from __future__ import annotations

from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from liveprune.patches.admission import admitting

HEADER = "x-liveprune-variant"
ARM_HEADER = "x-liveprune-arm"
"""``EXPERIMENT/ARM``, where an experiment chose the variant."""


class VariantMiddleware:
    """Open the request's admission; close it after the last byte, or when the client has gone.

    A realtime websocket is one admission too: its variant stays for the whole session.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        with admitting(scope) as admission:

            async def name_variant(message: Message) -> None:
                starts = message["type"] == "http.response.start"
                if starts and admission.answered and admission.served is not None:
                    headers = MutableHeaders(raw=list(message.get("headers", ())))
                    # Names may have characters that headers have not.
                    headers[HEADER] = quote(admission.served.name, safe="/:@+,=~")
                    if (assigned := admission.assignment) is not None:
                        headers[ARM_HEADER] = quote(f"{assigned.experiment}/{assigned.arm}")
                    message = {**message, "headers": headers.raw}
                await send(message)

            await self.app(scope, receive, name_variant)
