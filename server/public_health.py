"""Does the public API of this server answer: asked over loopback, as a client would."""

from __future__ import annotations

import httpx

TIMEOUT = 5.0
"""Seconds."""
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - not bound, translated


async def answers(address: str) -> bool:
    """Ask ``/health``.

    A refusal by a middleware, e.g. for want of a key, is an answer; 503 is a dead engine.

    Args:
        address: where vLLM says that it listens, e.g. ``http://0.0.0.0:8000`` or ``unix:/a/path``.
    """
    socket, url = None, address
    if address.startswith("unix:"):
        socket, url = address.removeprefix("unix:"), "http://localhost"
    for any_host, loopback in _ANY_ADDRESS.items():
        url = url.replace(f"//{any_host}:", f"//{loopback}:")
    # The certificate is for the public name, and we ask ourselves.
    transport = httpx.AsyncHTTPTransport(uds=socket, verify=False)
    try:
        async with httpx.AsyncClient(transport=transport, timeout=TIMEOUT) as client:
            return (await client.get(f"{url}/health")).status_code < 500
    except httpx.TransportError:
        return False
