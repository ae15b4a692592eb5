from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI

from liveprune.pruning.errors import ConflictError, EngineError
from liveprune.server import admin_client
from liveprune.server.admin_client import AdminClient
from tests.server.fake_control import KEY, FakeControl, admin_app, serving, view


@pytest.fixture
def control() -> FakeControl:
    return FakeControl(known=[view("full"), view("e4")])


@pytest.fixture
def url(control: FakeControl, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "p.json").write_text("{}")
    with serving(admin_app(control, tmp_path)) as address:
        yield address


def test_every_call_reaches_its_route(control: FakeControl, url: str, tmp_path: Path) -> None:
    with AdminClient(url + "/", KEY) as client:
        assert client.variants() == [variant.to_json() for variant in control.known]
        assert client.status()["model"] == "tiny"
        operation = client.add("e2", "p.json")
        assert client.operation(operation["id"]) == operation
        assert client.operations() == [operation]
        assert client.cancel(operation["id"])["state"] == "cancelled"
        client.remove("tiny:e4")
        client.swap("e4")
        client.swap("tiny:e4", keep_previous=True)
        assert client.rollback()["kind"] == "rollback"
    assert control.calls == [
        ("add", "e2", tmp_path / "p.json", None),
        ("cancel", operation["id"]),
        ("remove", "e4", None),
        ("swap", "e4", False, None),
        ("swap", "e4", True, None),
        ("rollback", "full", None),
    ]


def test_an_error_of_the_api_is_passed_on_as_it_is(control: FakeControl, url: str) -> None:
    control.error = ConflictError("swap to tiny:e4: another swap runs")
    with AdminClient(url, KEY) as client:
        with pytest.raises(EngineError, match=r"^swap to tiny:e4: another swap runs$"):
            client.swap("e4")
        with pytest.raises(EngineError, match="operation a b is unknown"):
            client.operation("a b")


def test_a_refused_key_is_named_by_its_source_only(url: str) -> None:
    with (
        AdminClient(url, "wrong-key", key_source="/etc/keys") as client,
        pytest.raises(EngineError, match=r"the key was refused.*from /etc/keys") as caught,
    ):
        client.status()
    assert "wrong-key" not in str(caught.value)


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with (
            AdminClient(f"http://127.0.0.1:{port}", KEY) as client,
            pytest.raises(EngineError, match=rf"127.0.0.1:{port}: not reachable.*--admin-url"),
        ):
            client.status()


@pytest.mark.parametrize("url", ["127.0.0.1:8001", "ftp://127.0.0.1", "http://"])
def test_a_url_that_is_none(url: str) -> None:
    with (
        AdminClient(url, KEY) as client,
        pytest.raises(EngineError, match=f"^{url.rstrip('/')}: not reachable"),
    ):
        client.status()


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_client, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with AdminClient(url, KEY) as client, pytest.raises(EngineError, match="no answer within"):
            client.status()


@pytest.mark.parametrize("status", [200, 404])
def test_another_server_on_that_port(status: int) -> None:
    app = FastAPI()

    @app.get("/admin/v1/status", status_code=status)
    async def other() -> list[int]:
        return [1]

    with (
        serving(app) as url,
        AdminClient(url, KEY) as client,
        pytest.raises(EngineError, match=f"status {status} that is not the admin API's"),
    ):
        client.status()


def test_proxies_never_see_the_key(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with AdminClient(url, KEY) as client:
        assert client.status()["ready"] is True
