from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from liveprune.server.public_health import answers


@contextmanager
def serving(status: int) -> Iterator[int]:
    """A server that knows ``/health`` alone; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 500)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "expected"), [(200, True), (401, True), (503, False), (500, False)]
)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # noqa: S104 - as vLLM says it
def test_any_answer_but_a_failure_counts(status: int, expected: bool, host: str) -> None:
    with serving(status) as port:
        assert asyncio.run(answers(f"http://{host}:{port}")) is expected


def test_no_server_is_no_answer(tmp_path: Path) -> None:
    with serving(200) as port:
        pass
    assert not asyncio.run(answers(f"http://127.0.0.1:{port}"))
    assert not asyncio.run(answers(f"unix:{tmp_path}/none"))


def test_a_unix_socket_is_asked(tmp_path: Path) -> None:
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readline())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def ask() -> bool:
        async with await asyncio.start_unix_server(answer, tmp_path / "s"):
            return await answers(f"unix:{tmp_path}/s")

    assert asyncio.run(ask())
    assert heard == [b"GET /health HTTP/1.1\r\n"]
