"""Who may use the admin port: a pure decision, and the gate that asks it for every request.

The gate refuses by default. Only the paths that it is told are open, so a route that somebody adds
later, and a path that does not exist, need the key as well.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from liveprune.server.admin_errors import error_response
from liveprune.server.admin_key import key_digest

logger = logging.getLogger("liveprune.admin")


@dataclass(frozen=True)
class Decision:
    """The answer to one request's headers."""

    who: str | None
    """Fingerprint of the key that opened; None: refused."""
    reason: str = ""
    """Why it was refused."""


def fingerprint(digest: bytes) -> str:
    """First 8 hexadecimal digits: names a key in logs and does not give it away."""
    return digest.hex()[:8]


def decide_auth(
    authorization: str | None, x_api_key: str | None, keys: Sequence[bytes]
) -> Decision:
    """Decide whether a request's headers open the admin port.

    Args:
        authorization: ``Authorization`` header, expected ``Bearer KEY``.
        x_api_key: ``X-API-Key`` header. When both are given, both must hold a right key.
        keys: digests (``key_digest``) of the keys that open.

    Digests of equal length are compared, all of them, so that the time taken tells nothing.
    """
    if not keys:
        return Decision(None, "this server has no admin key, so its admin API is closed")
    given: list[str] = []
    if authorization is not None:
        scheme, _, token = authorization.strip().partition(" ")
        if scheme.lower() != "bearer":
            return Decision(None, "expected the header 'Authorization: Bearer KEY'")
        given.append(token.strip())
    if x_api_key is not None:
        given.append(x_api_key.strip())
    if not given:
        return Decision(None, "found no admin key; expected the header 'Authorization: Bearer KEY'")
    digests = [key_digest(key) for key in given]
    known = [sum(hmac.compare_digest(digest, key) for key in keys) for digest in digests]
    if not all(known):
        return Decision(None, "found a key that is not an admin key of this server")
    return Decision(fingerprint(digests[0]))


class AdminGate:
    """ASGI middleware: every request needs a key, but for the open paths."""

    def __init__(
        self, app: ASGIApp, keys: Callable[[], Sequence[bytes]], open_paths: Collection[str]
    ) -> None:
        """``keys`` is asked at every request, so that keys can change while the server runs."""
        self.app = app
        self.keys = keys
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (
            scope["type"] == "http" and scope["path"] in self.open_paths
        ):
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"admin API: found a {scope['type']} connection, expected http")
        headers = Headers(scope=scope)
        given = headers.get("authorization"), headers.get("x-api-key")
        decision = decide_auth(*given, self.keys())
        if decision.who is not None:
            state = scope.setdefault("state", {})
            state["who"] = decision.who
            # For answers that do not end by themselves: keys may be taken away meanwhile.
            state["still_admitted"] = lambda: decide_auth(*given, self.keys()).who is not None
            await self.app(scope, receive, send)
            return
        remote = scope["client"][0] if scope.get("client") else "unknown"
        logger.warning(
            "refused %s %r from %s: %s", scope["method"], scope["path"], remote, decision.reason
        )
        await error_response(403, decision.reason)(scope, receive, send)
