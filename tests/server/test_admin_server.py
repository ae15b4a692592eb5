from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from liveprune.server import admin_server
from liveprune.server.admin_server import bind, start
from tests.server.fake_control import BEARER, FakeControl, admin_app, audited


async def get(url: str, path: str = "/health", **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(url + path, headers=headers)


def test_it_serves_beside_what_the_loop_does_and_stops(tmp_path: Path) -> None:
    async def run() -> None:
        server = await start(admin_app(FakeControl(), tmp_path), port=0)
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert (await get(server.url)).json() == {"status": "ok"}
        assert (await get(server.url, "/admin/v1/status")).status_code == 403
        assert (await get(server.url, "/admin/v1/status", **BEARER)).status_code == 200
        await server.stop()
        await server.stop()
        with pytest.raises(httpx.ConnectError):
            await get(server.url)
        # The port is free again at once.
        bind(port=server.port).close()

    asyncio.run(run())


def test_a_port_that_is_taken_is_named_before_anything_is_served() -> None:
    async def never(*_: Any) -> None:
        raise AssertionError("nothing may be served")

    with bind(port=0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            OSError, match=rf"cannot listen on 127.0.0.1 port {port}: Address already in use"
        ) as caught:
            asyncio.run(start(never, port=port))
    assert caught.value.errno == errno.EADDRINUSE


def test_a_port_taken_early_is_served_later(tmp_path: Path) -> None:
    async def run() -> None:
        listener = bind(port=0)
        port = listener.getsockname()[1]
        early = asyncio.create_task(get(f"http://127.0.0.1:{port}"))
        await asyncio.sleep(0)
        server = await start(admin_app(FakeControl(), tmp_path), listener=listener)
        assert server.port == port
        assert (await early).status_code == 200
        await server.stop()

    asyncio.run(run())


def test_signals_and_loggers_stay_as_they_are(tmp_path: Path) -> None:
    names = ("", "uvicorn", "uvicorn.access", "uvicorn.error", "liveprune")
    access = logging.getLogger("uvicorn.access")
    handler = logging.NullHandler()
    access.addHandler(handler)

    def around() -> list[Any]:
        loggers = [logging.getLogger(name) for name in names]
        return [
            [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
            [(one.level, list(one.handlers), one.propagate, one.disabled) for one in loggers],
        ]

    async def run() -> None:
        before = around()
        server = await start(admin_app(FakeControl(), tmp_path), port=0)
        assert around() == before
        await get(server.url)
        await server.stop()
        assert around() == before

    try:
        asyncio.run(run())
    finally:
        access.removeHandler(handler)


def test_other_machines_are_let_in_only_when_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "liveprune.admin"):
        for host in ("127.0.0.1", "localhost", "127.0.0.2"):
            bind(host, 0).close()
        assert caplog.text == ""
        bind("0.0.0.0", 0).close()  # noqa: S104 - what is tested
    assert "0.0.0.0" in caplog.text  # noqa: S104
    assert "other machines can reach" in caplog.text


def test_an_empty_host_is_not_every_address() -> None:
    with pytest.raises(OSError, match="empty host"):
        bind("", 0)


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {host} port 0"):
        bind(host, 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6_addresses_are_bracketed_in_urls() -> None:
    assert admin_server._in_url("::1") == "[::1]"


def test_the_audit_log_names_the_peer_and_not_a_header(tmp_path: Path) -> None:
    async def run() -> None:
        server = await start(admin_app(FakeControl(), tmp_path), port=0)
        headers = {**BEARER, "X-Forwarded-For": "198.51.100.7"}
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.post(f"{server.url}/admin/v1/rollback", headers=headers)
        assert answer.status_code == 202
        assert "server" not in answer.headers
        await server.stop()

    asyncio.run(run())
    asked = audited(tmp_path)[0]
    assert asked["remote"] == "127.0.0.1"


def test_a_request_under_way_may_end(tmp_path: Path) -> None:
    control = FakeControl()
    reached, release = asyncio.Event(), asyncio.Event()
    answer = control.status

    async def slow_status() -> Any:
        reached.set()
        await release.wait()
        return await answer()

    control.status = slow_status  # type: ignore[method-assign]

    async def run() -> None:
        server = await start(admin_app(control, tmp_path), port=0)
        request = asyncio.create_task(get(server.url, "/ready"))
        await reached.wait()
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        release.set()
        assert (await request).status_code == 200
        await stopping

    asyncio.run(run())


def test_a_server_that_dies_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = asyncio.Event()

    async def fail(*_: Any) -> None:
        await served.wait()
        raise OSError("out of files")

    async def run() -> None:
        monkeypatch.setattr(admin_server._Server, "main_loop", fail)
        server = await start(admin_app(FakeControl(), tmp_path), port=0)
        served.set()
        await server.stop()
        with pytest.raises(OSError, match="out of files"):
            await start(admin_app(FakeControl(), tmp_path), port=0)

    with caplog.at_level(logging.ERROR, "liveprune.admin"):
        asyncio.run(run())
    assert "the admin API has stopped: out of files" in caplog.text
