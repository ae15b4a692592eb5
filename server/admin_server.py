"""The admin port: uvicorn on a socket of its own, inside a loop that runs already (vLLM's).

It leaves the process as it is: no signal handlers, no logging configuration, no exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

HOST = "127.0.0.1"
PORT = 8001
STOP_SECONDS = 5
"""Time that requests get to end when the server stops."""

logger = logging.getLogger("liveprune.admin")


@dataclass(frozen=True)
class AdminServer:
    """A running server."""

    host: str
    port: int
    _server: uvicorn.Server
    _task: asyncio.Task[None]
    _on_stop: Callable[[], None]

    @property
    def url(self) -> str:
        """Root of the admin API."""
        return f"http://{_in_url(self.host)}:{self.port}"

    async def stop(self) -> None:
        """Let requests end, for a few seconds, and close the port; a second call does nothing."""
        self._on_stop()
        self._server.should_exit = True
        await asyncio.wait([self._task])


def bind(host: str = HOST, port: int = PORT) -> socket.socket:
    """Take the admin port; requests wait until ``start`` serves them.

    Worth doing before a model is loaded, which takes minutes, so that a port that is taken is found
    out first.

    Args:
        host: an address or name. One that other machines reach is allowed, with a warning.
        port: 0 picks a free one.

    Raises:
        OSError: the port is taken, or the address is none of this machine's.
    """
    if not host:
        # A socket takes an empty host for every address there is.
        raise OSError("admin API: found an empty host, expected an address such as 127.0.0.1")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno is not None and error.errno > 0:
            reason = os.strerror(error.errno)
        message = f"admin API: cannot listen on {host} port {port}: {reason}"
        raise OSError(error.errno, message) from error
    found = listener.getsockname()[0]
    if not ipaddress.ip_address(found).is_loopback:
        logger.warning(
            "the admin API listens on %s, which other machines can reach, without encryption: "
            "anybody with an admin key can change what is served",
            found,
        )
    return listener


async def start(
    app: Any,
    host: str = HOST,
    port: int = PORT,
    *,
    listener: socket.socket | None = None,
    on_stop: Callable[[], None] = lambda: None,
) -> AdminServer:
    """Serve ``app`` (ASGI) until ``stop``; returns when it answers.

    Args:
        app: the admin app.
        host: see ``bind``.
        port: see ``bind``.
        listener: what ``bind`` returned, if the port was taken early; ``host`` and ``port`` then
            do not matter.
        on_stop: ends answers that do not end by themselves; called first by ``stop``.

    Raises:
        OSError: see ``bind``.
    """
    listener = listener or bind(host, port)
    name = listener.getsockname()
    server = _Server(
        _Config(
            app,
            lifespan="off",  # uvicorn exits the process when a life cycle fails
            ws="none",
            proxy_headers=False,  # the audit log names the peer, not what a header says
            server_header=False,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
    )
    task = asyncio.create_task(_serve(server, listener), name="liveprune-admin")
    task.add_done_callback(_report)
    while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    if task.done():
        task.result()
    running = AdminServer(name[0], name[1], server, task, on_stop)
    logger.info("admin API on %s", running.url)
    return running


class _Config(uvicorn.Config):
    def configure_logging(self) -> None:
        """Leave uvicorn's loggers alone: they are vLLM's public server's as well."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: vLLM's server decides when the process ends."""
        yield


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    try:
        await server.serve([listener])
    finally:
        # uvicorn closes them when it stops, but not when it fails: clients would wait for ever.
        for each in getattr(server, "servers", ()):
            each.close()
        listener.close()


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the admin API has stopped: %s", error, exc_info=error)


def local_url(listener: socket.socket) -> str:
    """Root of the admin API as processes of this machine reach it."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if listener.family == socket.AF_INET6 else HOST
    return f"http://{_in_url(host)}:{port}"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
