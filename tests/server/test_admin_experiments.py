"""Experiments over HTTP: accepted, refused, listed, changed; decisions; feedback; the audit log."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from liveprune.server.admin_api import make_app
from liveprune.server.admin_key import key_digest
from liveprune.server.audit import AuditLog
from liveprune.server.experiments.decision import replay
from tests.server.experiment_world import START, Clock, Site, definition
from tests.server.fake_control import BEARER, KEY, ask


class Api:
    """The admin app over a site."""

    def __init__(self, folder: Path) -> None:
        self.site = Site(folder, Clock())
        self.audit = AuditLog(self.site.store)
        self.app: FastAPI = make_app(
            self.site.control,
            keys=lambda: [key_digest(KEY)],
            audit=self.audit,
            roots=[folder],
            experiments=self.site.service,
        )

    def ask(self, method: str, path: str, json: Any = None, key: str | None = None) -> Any:
        headers = BEARER | ({"Idempotency-Key": key} if key else {})
        answer = ask(self.app, method, f"/admin/v1/{path}", json=json, headers=headers)
        return answer.status_code, answer.json()

    def audited(self) -> list[tuple[str, Any]]:
        """What was asked, and the status of the answer; the oldest first."""
        rows = self.audit.entries()[::-1]
        asked = {row["id"]: row["path"] for row in rows if row["event"] == "asked"}
        return [(asked[row["id"]], row["status"]) for row in rows if row["event"] == "answered"]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    made = Api(tmp_path)
    yield made
    made.site.store.close()


def test_an_experiment_from_start_to_stop(api: Api) -> None:
    status, body = api.ask("POST", "experiments", definition(), key="k")
    assert status == 201
    assert (body["name"], body["state"], body["phase"]) == ("halve", "running", 0)
    assert (body["started"], body["paused"], body["decision"]) == (START, None, None)
    assert body["definition"]["alpha"] == 0.05
    assert body["definition"]["model"] == "tiny"
    assert api.ask("POST", "experiments", definition(), key="k") == (201, body)
    api.site.control.known.clear()  # the variants are gone: the repetition is no new start
    assert api.ask("POST", "experiments", definition(), key="k") == (201, body)
    assert api.ask("GET", "experiments") == (200, {"experiments": [body]})
    arms = api.site.serve(40)
    asyncio.run(api.site.look())
    status, body = api.ask("GET", "experiments/halve")
    assert status == 200
    for arm in body["arms"]:
        count = list(arms.values()).count(arm["name"])
        assert (arm["units"], arm["requests"], arm["share"]) == (count, count, 0.5)
        metric = arm["metrics"]["e2e_seconds"]
        assert metric["count"] == count
        assert 0.3 < metric["p50"] <= metric["p95"] <= metric["p99"] < 4
        assert arm["metrics"]["loop"] == {
            "count": count,
            "mean": 0.0,
            "p50": None,
            "p95": None,
            "p99": None,
        }
    status, body = api.ask(
        "PATCH", "experiments/halve/weights", {"weights": {"full": 0.25, "pruned": 0.75}}
    )
    assert (status, [arm["share"] for arm in body["arms"]], body["phase"]) == (200, [0.25, 0.75], 1)
    status, body = api.ask("POST", "experiments/halve/stop", {"reason": "enough"})
    assert (status, body["state"], body["reason"]) == (200, "stopped", "enough")
    assert api.audited() == [
        *[("/admin/v1/experiments", 201)] * 3,
        ("/admin/v1/experiments/halve/weights", 200),
        ("/admin/v1/experiments/halve/stop", 200),
    ]


def test_decisions_can_be_replayed(api: Api) -> None:
    api.ask("POST", "experiments", definition())
    status, body = api.ask("GET", "experiments/halve/decision")
    assert status == 404
    assert "found no decision yet" in body["error"]["message"]
    api.site.serve(300, loops={"pruned": 0.6})
    asyncio.run(api.site.look())
    status, newest = api.ask("GET", "experiments/halve/decision")
    assert (status, newest["verdict"], newest["arm"]) == (200, "ROLLBACK", "pruned")
    assert newest["actions"] == ["notify", "rollback"]
    assert api.ask("GET", "experiments/halve/decisions") == (200, {"decisions": [newest]})
    status, whole = api.ask("GET", f"experiments/halve/decisions/{newest['id']}")
    again = replay(whole.pop("record"))
    assert whole == newest
    assert (again.verdict, list(again.reasons)) == ("ROLLBACK", newest["reasons"])
    assert [vars(x) for x in again.findings] == newest["findings"]
    assert api.ask("GET", "experiments/halve/decisions/999")[0] == 404


def test_refusals(api: Api) -> None:
    for method, path, body in (
        ("GET", "experiments/none", None),
        ("GET", "experiments/none/decision", None),
        ("GET", "experiments/none/decisions", None),
        ("GET", "experiments/none/decisions/1", None),
        ("POST", "experiments/none/stop", {}),
        ("PATCH", "experiments/none/weights", {"weights": {"a": 1}}),
        ("POST", "feedback", {"response_id": "none", "score": 1}),
    ):
        assert api.ask(method, path, body)[0] == 404, path
    status, body = api.ask("POST", "experiments", definition(primary={"metric": "speed"}))
    assert status == 422
    assert "found 'speed', expected one of ttft_seconds" in body["error"]["message"]
    assert api.ask("POST", "experiments", [1])[0] == 400
    status, body = api.ask(
        "POST",
        "experiments",
        definition(
            arms=[
                {"name": "full", "variant": "full", "weight": 0.5},
                {"name": "off", "variant": "off", "weight": 0.5},
            ]
        ),
    )
    assert status == 409
    assert "is standby here, expected live" in body["error"]["message"]
    api.ask("POST", "experiments", definition(), key="k")
    assert api.ask("POST", "experiments", definition(alpha=0.1), key="k")[0] == 409
    assert api.ask("POST", "experiments", definition())[0] == 409
    status, body = api.ask("POST", "experiments", definition(name="more"))
    assert status == 422
    assert "which experiment halve owns" in body["error"]["message"]
    for weights in ({"full": 2, "pruned": -1}, {"full": "x"}):
        assert api.ask("PATCH", "experiments/halve/weights", {"weights": weights})[0] == 400
    assert api.ask("PATCH", "experiments/halve/weights", {"weights": {"full": 1}})[0] == 422
    for score in (-0.1, 1.1, "x"):
        assert api.ask("POST", "feedback", {"response_id": "a", "score": score})[0] == 400


def test_a_check_says_what_would_run_and_starts_nothing(api: Api) -> None:
    status, body = api.ask("POST", "experiments/check", definition(ramp=[0.75]))
    assert status == 200
    assert body["definition"]["ramp"] == [0.75]
    assert body["definition"]["srm_alpha"] == 0.001
    assert api.ask("POST", "experiments/check", definition(ramp=[0.1]))[0] == 422
    assert api.ask("GET", "experiments") == (200, {"experiments": []})
    assert api.audited() == []


def test_feedback(api: Api) -> None:
    api.ask("POST", "experiments", definition())
    arms = api.site.serve(3)
    status, body = api.ask("POST", "feedback", {"response_id": "id-2", "score": 0.5})
    assert (status, body) == (200, {"experiment": "halve", "arm": arms["user-2"]})
    assert api.ask("POST", "feedback", {"response_id": "id-2", "score": 0.5})[0] == 404
    measured = api.site.live.measured("halve")
    assert measured is not None
    assert measured.phases[0].cells[arms["user-2"]]["score"].moments.mean == 0.5
    # Clients' scores change nothing of what is served, and may be many.
    assert [path for path, _ in api.audited()] == ["/admin/v1/experiments"]


def test_a_server_without_live_variants(api: Api, tmp_path: Path) -> None:
    app = make_app(
        api.site.control, keys=lambda: [key_digest(KEY)], audit=api.audit, roots=[tmp_path]
    )
    answer = ask(app, "GET", "/admin/v1/experiments")
    assert answer.status_code == 501
    assert "its variants need restarts (rebuild mode)" in answer.json()["error"]["message"]
