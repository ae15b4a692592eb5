from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from liveprune.server.admin_auth import AdminGate, decide_auth, fingerprint
from liveprune.server.admin_key import key_digest

OLD, NEW = "old-key", "new-key"
KEYS = (key_digest(OLD), key_digest(NEW))
WHO_OLD, WHO_NEW = (hashlib.sha256(key.encode()).hexdigest()[:8] for key in (OLD, NEW))


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "who"),
    [
        (f"Bearer {OLD}", None, WHO_OLD),
        (f"Bearer {NEW}", None, WHO_NEW),
        (f"bearer   {NEW} ", None, WHO_NEW),
        (None, OLD, WHO_OLD),
        (None, f" {OLD} ", WHO_OLD),
        (f"Bearer {OLD}", NEW, WHO_OLD),
        # Refused.
        (None, None, None),
        ("", None, None),
        ("Bearer", None, None),
        ("Bearer ", None, None),
        (None, "", None),
        (OLD, None, None),
        (f"Basic {OLD}", None, None),
        (f"Bearer {OLD} {NEW}", None, None),
        (f"Bearer {OLD[:-1]}", None, None),
        (f"Bearer {OLD}x", None, None),
        (f"Bearer {OLD.upper()}", None, None),
        (f"Bearer {OLD}", "wrong", None),
        ("Bearer wrong", OLD, None),
        (f"Basic {OLD}", OLD, None),
        ("Bearer kéy\xff", None, None),
        (f"Bearer {KEYS[0].hex()}", None, None),
    ],
)
def test_only_a_right_key_opens(
    authorization: str | None, x_api_key: str | None, who: str | None
) -> None:
    decision = decide_auth(authorization, x_api_key, KEYS)
    assert decision.who == who
    assert bool(decision.reason) == (who is None)


@pytest.mark.parametrize("key", ["", OLD])
def test_without_keys_nothing_opens(key: str) -> None:
    decision = decide_auth(f"Bearer {key}", key, ())
    assert decision.who is None
    assert "no admin key" in decision.reason


def test_a_removed_key_opens_no_more() -> None:
    assert decide_auth(f"Bearer {OLD}", None, KEYS[1:]).who is None


def test_a_reason_never_repeats_a_key() -> None:
    for key in (OLD, "wrong-key"):
        for decision in (decide_auth(key, None, KEYS), decide_auth(f"Bearer {key}x", None, KEYS)):
            assert key not in decision.reason


def test_a_fingerprint_is_eight_digits_of_the_digest() -> None:
    assert fingerprint(KEYS[0]) == WHO_OLD


def through_gate(path: str, headers: dict[str, str], kind: str = "http") -> dict[str, Any]:
    """What the app behind the gate saw, and the status that went out."""
    seen: dict[str, Any] = {"state": None, "status": None}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen["state"] = scope.get("state", {})

    async def send(message: Any) -> None:
        seen["status"] = message.get("status", seen["status"])

    async def receive() -> Any:
        raise AssertionError("the gate must not read the body")

    scope = {
        "type": kind,
        "method": "POST",
        "path": path,
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        "client": ("127.0.0.1", 4711),
    }
    asyncio.run(AdminGate(app, lambda: KEYS, ("/health",))(scope, receive, send))
    return seen


def test_the_gate_tells_the_app_who_came() -> None:
    state = through_gate("/x", {"X-API-Key": NEW})["state"]
    assert (state["who"], state["still_admitted"]()) == (WHO_NEW, True)


def test_the_gate_lets_nothing_through_without_a_key(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "liveprune.admin"):
        seen = through_gate("/x\ny", {"Authorization": "Bearer wrong-key"})
    assert seen == {"state": None, "status": 403}
    assert "127.0.0.1" in caplog.text
    assert "wrong-key" not in caplog.text
    assert "/x\ny" not in caplog.text  # a path cannot forge a line of the log


@pytest.mark.parametrize("path", ["/health/", "//health", "/health/x", "/HEALTH", "/x/../health"])
def test_only_the_exact_open_path_is_open(path: str) -> None:
    assert through_gate("/health", {}) == {"state": {}, "status": None}
    assert through_gate(path, {}) == {"state": None, "status": 403}


def test_no_other_protocol_passes() -> None:
    with pytest.raises(RuntimeError, match="found a websocket connection"):
        through_gate("/x", {"X-API-Key": NEW}, "websocket")
