"""The script of `helm test`, against a server that answers like ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "helm/liveprune/files/check_server.py"
KEY = "correct-horse-battery"


class Server(ThreadingHTTPServer):
    """Serves the models `mixtral` and `mixtral:e4k1` to those who send KEY."""

    health = 200


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        body = b""
        if self.path == "/health":
            status = self.server.health
        elif self.path != "/v1/models":
            status = 404
        elif self.headers["Authorization"] != f"Bearer {KEY}":
            status = 401
        else:
            status = 200
            cards = [{"id": "mixtral"}, {"id": "mixtral:e4k1"}]
            body = json.dumps({"object": "list", "data": cards}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Leave standard error to pytest."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def check(server: Server, model: str, key: str) -> subprocess.CompletedProcess[str]:
    """Run the script as the pod does: as text, with the key in the environment."""
    arguments = ["127.0.0.1", str(server.server_port), model]
    command = [sys.executable, "-c", SCRIPT.read_text(), *arguments]
    environment = os.environ | {"VLLM_API_KEY": key}
    return subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=60
    )


def test_healthy(server: Server) -> None:
    result = check(server, "mixtral", KEY)
    assert result.returncode == 0, result.stderr
    assert "mixtral, mixtral:e4k1" in result.stdout


def test_wrong_model(server: Server) -> None:
    result = check(server, "qwen3", KEY)
    assert result.returncode == 1
    assert "['mixtral', 'mixtral:e4k1'], expected 'qwen3'" in result.stderr


def test_wrong_key(server: Server) -> None:
    result = check(server, "mixtral", "no-such-key")
    assert result.returncode == 1
    assert "401" in result.stderr


def test_unhealthy(server: Server) -> None:
    server.health = 503
    result = check(server, "mixtral", KEY)
    assert result.returncode == 1
    assert "503" in result.stderr
