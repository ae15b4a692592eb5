from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from liveprune.pruning.errors import (
    CheckpointError,
    ConflictError,
    DataError,
    EngineError,
    LiveprunError,
    PlanError,
    VariantError,
)
from liveprune.server import admin_api
from liveprune.server.operations import State
from liveprune.server.store.store import DATABASE
from tests.server.fake_control import BEARER, KEY, FakeControl, admin_app, ask, audited, view


@dataclass
class Served:
    control: FakeControl
    folder: Path
    app: FastAPI

    def ask(self, method: str, path: str, **arguments: Any) -> Any:
        return ask(self.app, method, path, **arguments)

    def audited(self) -> list[dict[str, Any]]:
        return audited(self.folder)


@pytest.fixture
def served(tmp_path: Path) -> Served:
    control = FakeControl(kept={"full": []})
    (tmp_path / "p.json").write_text("{}")
    return Served(control, tmp_path, admin_app(control, tmp_path, "older-key", KEY))


ADD = {"tag": "e4", "plan": "p.json"}
MUTATIONS: list[tuple[str, str, Any]] = [
    ("POST", "/admin/v1/variants", ADD),
    ("DELETE", "/admin/v1/variants/full", None),
    ("POST", "/admin/v1/swap", {"variant": "full"}),
    ("POST", "/admin/v1/rollback", None),
    ("POST", "/admin/v1/operations/{operation}/cancel", None),
]
READS = [
    ("GET", "/admin/v1/variants"),
    ("GET", "/admin/v1/variants/full/plan"),
    ("GET", "/admin/v1/operations"),
    ("GET", "/admin/v1/operations/{operation}"),
    ("GET", "/admin/v1/status"),
    ("GET", "/openapi.json"),
]
FULL: dict[str, Any] = {"plans": [None]}
EVALUATIONS: list[tuple[str, str, Any]] = [
    ("POST", "/admin/v1/score", {**FULL, "rows": [{"prompt": [1], "answer": [2]}]}),
    ("POST", "/admin/v1/generate", {**FULL, "prompts": [[1, 2]], "max_tokens": 3}),
]
STATISTICS = ["/admin/v1/statistics", "/admin/v1/statistics/file"]
"""Of a server that counts; the one here does not."""
JOB = {"method": "reap", "source": {"statistics": "live"}, "experts": "4", "tag": "a"}
JOBS: list[tuple[str, str, Any]] = [
    ("POST", "/admin/v1/jobs", JOB),
    ("GET", "/admin/v1/jobs", None),
    ("GET", "/admin/v1/jobs/{job}", None),
    ("GET", "/admin/v1/jobs/{job}/logs", None),
    ("POST", "/admin/v1/jobs/{job}/cancel", None),
    ("POST", "/admin/v1/jobs/{job}/resume", None),
    ("GET", "/admin/v1/background", None),
    ("POST", "/admin/v1/background", {"enabled": True}),
]
"""Of a server with a store; the one here has none (``jobs/test_admin_jobs.py``)."""
EXPERIMENTS: list[tuple[str, str, Any]] = [
    ("POST", "/admin/v1/experiments", {"name": "halve"}),
    ("POST", "/admin/v1/experiments/check", {"name": "halve"}),
    ("GET", "/admin/v1/experiments", None),
    ("GET", "/admin/v1/experiments/{name}", None),
    ("PATCH", "/admin/v1/experiments/{name}/weights", {"weights": {"full": 1}}),
    ("POST", "/admin/v1/experiments/{name}/stop", {"reason": "x"}),
    ("GET", "/admin/v1/experiments/{name}/decision", None),
    ("GET", "/admin/v1/experiments/{name}/decisions", None),
    ("GET", "/admin/v1/experiments/{name}/decisions/{number}", None),
    ("POST", "/admin/v1/feedback", {"response_id": "x", "score": 1}),
]
"""Of a server with live variants and a store (``test_admin_experiments.py``)."""
WITHOUT_STORE = tuple(f"/admin/v1/{x}" for x in ("jobs", "background", "experiments", "feedback"))
NAMES = {"job": "1234", "name": "halve", "number": "1"}
ROUTES = [
    *JOBS,
    *EXPERIMENTS,
    *MUTATIONS,
    *EVALUATIONS,
    *((method, path, None) for method, path in READS),
    *(("GET", path, None) for path in STATISTICS),
]
OPEN = ["/health", "/ready", "/metrics"]


def an_operation(served: Served) -> str:
    id_: str = served.ask("POST", "/admin/v1/rollback").json()["id"]
    served.control.calls.clear()
    return id_


def test_the_tables_of_this_file_name_every_route(served: Served) -> None:
    found = {
        (method, route.path)
        for route in served.app.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    listed = {
        (method, path.replace("{operation}", "{operation_id}").replace("{job}", "{job_id}"))
        for method, path, _ in ROUTES
    }
    listed -= {
        ("GET", "/openapi.json"),
        ("GET", "/admin/v1/variants/full/plan"),
        ("DELETE", "/admin/v1/variants/full"),
    }
    listed |= {("GET", path) for path in OPEN} | {
        ("GET", "/admin/v1/variants/{tag:path}/plan"),
        ("DELETE", "/admin/v1/variants/{tag:path}"),
        ("GET", "/admin/v1/events"),  # test_event_feed.py
    }
    assert found == listed


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"X-API-Key": "wrong"},
        {"Authorization": f"Basic {KEY}"},
    ],
    ids=["none", "wrong", "wrong-x", "basic"],
)
def test_every_route_is_closed_without_the_right_key(
    served: Served, method: str, path: str, body: Any, headers: dict[str, str]
) -> None:
    path = path.format(operation=an_operation(served), **NAMES)
    answer = served.ask(method, path, json=body, headers=headers)
    assert answer.status_code == 403
    error = answer.json()["error"]
    assert error == {
        "message": error["message"],
        "type": "PermissionDeniedError",
        "param": None,
        "code": 403,
    }
    assert served.control.calls == []


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
@pytest.mark.parametrize("headers", [BEARER, {"X-API-Key": "older-key"}], ids=["new", "old"])
def test_every_route_opens_with_any_right_key_and_never_shows_it(
    served: Served, method: str, path: str, body: Any, headers: dict[str, str]
) -> None:
    path = path.format(operation=an_operation(served), **NAMES)
    answer = served.ask(method, path, json=body, headers=headers)
    changes = (method, path) not in [route[:2] for route in EVALUATIONS] and method != "GET"
    absent = path in STATISTICS or path.startswith(WITHOUT_STORE)
    assert answer.status_code == (501 if absent else 202 if changes else 200)
    assert len(served.control.calls) == (method != "GET" and not absent)
    for key in (KEY, "older-key"):
        assert key not in answer.text + str(answer.headers)
        assert key not in str(served.audited())


@pytest.mark.parametrize("path", OPEN)
def test_probes_and_metrics_need_no_key(served: Served, path: str) -> None:
    assert served.ask("GET", path, headers={}).status_code == 200


@pytest.mark.parametrize("path", ["/nothing", "/docs", "/redoc", "/admin/v1", "/admin/v1/nothing"])
def test_what_does_not_exist_is_closed_too(served: Served, path: str) -> None:
    assert served.ask("GET", path, headers={}).status_code == 403
    answer = served.ask("GET", path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "NotFoundError"
    assert path in answer.json()["error"]["message"]


def test_a_wrong_method_is_an_error_in_the_shape(served: Served) -> None:
    answer = served.ask("PUT", "/admin/v1/swap")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert answer.json()["error"]["code"] == 405


# What the control plane is asked.


@pytest.mark.parametrize("tag", ["e4", "tiny:e4"])
def test_add_passes_tag_resolved_plan_and_idempotency_key(served: Served, tag: str) -> None:
    (served.folder / "link.json").symlink_to("p.json")
    answer = served.ask(
        "POST",
        "/admin/v1/variants",
        json={"tag": tag, "plan": "link.json"},
        headers={**BEARER, "Idempotency-Key": "once"},
    )
    assert served.control.calls == [("add", "e4", served.folder / "p.json", "once")]
    operation = answer.json()
    assert operation["variant"] == "tiny:e4"
    assert operation["state"] == "queued"
    assert answer.headers["location"] == f"/admin/v1/operations/{operation['id']}"
    assert served.ask("GET", answer.headers["location"]).json() == operation


def test_the_other_mutations_pass_their_parameters_on(served: Served) -> None:
    served.control.known.append(view("e4"))
    once = {**BEARER, "Idempotency-Key": "once"}
    for name in ("e4", "tiny:e4", "tiny%3Ae4"):
        assert served.ask("DELETE", f"/admin/v1/variants/{name}").status_code == 202
    served.ask("DELETE", "/admin/v1/variants/e4", headers=once)
    served.ask("POST", "/admin/v1/swap", json={"variant": "tiny:e4"})
    served.ask(
        "POST", "/admin/v1/swap", json={"variant": "e4", "keep_previous": True}, headers=once
    )
    served.ask("POST", "/admin/v1/rollback")
    served.ask("POST", "/admin/v1/rollback", headers=once)
    assert served.control.calls == [
        ("remove", "e4", None),
        ("remove", "e4", None),
        ("remove", "e4", None),
        ("remove", "e4", "once"),
        ("swap", "e4", False, None),
        ("swap", "e4", True, "once"),
        ("rollback", "full", None),
        ("rollback", "full", "once"),
    ]


def test_a_model_name_may_hold_a_slash(served: Served) -> None:
    served.control.known = [view("e4", name="org/tiny:e4")]
    assert served.ask("DELETE", "/admin/v1/variants/org/tiny:e4").status_code == 202
    assert served.control.calls == [("remove", "e4", None)]


def test_cancel_names_the_operation(served: Served) -> None:
    id_ = an_operation(served)
    answer = served.ask("POST", f"/admin/v1/operations/{id_}/cancel")
    assert answer.json()["state"] == "cancelled"
    assert answer.json()["id"] == id_
    assert served.control.calls == [("cancel", id_)]


def test_answers_hold_everything_that_operators_see(served: Served) -> None:
    served.control.known.append(view("e4", state="draining", is_previous=True, in_flight=3))
    id_ = an_operation(served)
    operation = served.control.made[id_]
    operation.state, operation.error = State.FAILED, "no room"
    operation.seconds["filling"] = 1.25
    variants = [variant.to_json() for variant in served.control.known]
    assert served.ask("GET", "/admin/v1/variants").json() == {"variants": variants}
    shown = served.ask("GET", f"/admin/v1/operations/{id_}").json()
    assert shown == operation.to_json()
    assert served.ask("GET", "/admin/v1/operations").json() == {"operations": [shown]}
    status = served.ask("GET", "/admin/v1/status").json()
    assert status["variants"] == variants
    assert status["operation"] is None
    assert (status["model"], status["expert_bytes"], status["kv_blocks"]) == ("tiny", 1000, 40)


# Errors.


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (PlanError("bad"), 422, "UnprocessableEntityError"),
        (CheckpointError("bad"), 422, "UnprocessableEntityError"),
        (DataError("bad"), 422, "UnprocessableEntityError"),
        (VariantError("bad"), 422, "UnprocessableEntityError"),
        (ConflictError("bad"), 409, "ConflictError"),
        (EngineError("bad"), 503, "ServiceUnavailableError"),
        (LiveprunError("bad"), 500, "InternalServerError"),
    ],
)
def test_each_error_has_its_status(
    served: Served, error: Exception, status: int, kind: str
) -> None:
    served.control.error = error
    answer = served.ask("POST", "/admin/v1/swap", json={"variant": "full"})
    assert answer.status_code == status
    assert answer.json() == {
        "error": {"message": "bad", "type": kind, "param": None, "code": status}
    }
    assert served.audited()[-1]["status"] == status
    assert served.audited()[-1]["error"] == "bad"


def test_a_defect_tells_its_kind_and_nothing_else(served: Served) -> None:
    served.control.error = KeyError("/secret/path")
    answer = served.ask("POST", "/admin/v1/rollback")
    assert answer.status_code == 500
    assert "KeyError" in answer.json()["error"]["message"]
    assert "secret" not in answer.text


@pytest.mark.parametrize("name", ["nothing", "tiny:nothing", "other:full", ":full:x"])
def test_a_variant_that_is_not_there_is_404(served: Served, name: str) -> None:
    for method, path, body in (
        ("DELETE", f"/admin/v1/variants/{name}", None),
        ("POST", "/admin/v1/swap", {"variant": name}),
    ):
        answer = served.ask(method, path, json=body)
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "NotFoundError"
    assert served.control.calls == []


def test_a_new_variant_that_cannot_be_is_422_and_a_taken_name_409(served: Served) -> None:
    served.control.error = VariantError("no spare rows")
    assert served.ask("POST", "/admin/v1/variants", json=ADD).status_code == 422
    taken = {**ADD, "tag": "full"}
    assert served.ask("POST", "/admin/v1/variants", json=taken).status_code == 409


def test_a_repeated_removal_gets_its_operation_back(served: Served) -> None:
    served.control.known.clear()
    served.control._must_know = lambda tag: None  # type: ignore[method-assign]
    answer = served.ask("DELETE", "/admin/v1/variants/gone")
    assert answer.status_code == 202


def test_an_operation_that_is_not_there_is_404(served: Served) -> None:
    for method, path in (("GET", ""), ("POST", "/cancel")):
        answer = served.ask(method, f"/admin/v1/operations/nothing{path}")
        assert answer.status_code == 404
        assert "nothing" in answer.json()["error"]["message"]
    assert served.control.calls == []
    assert served.audited()[-1]["status"] == 404

    def unknown(operation_id: str) -> Any:
        raise VariantError(f"operation {operation_id!r} is unknown")

    served.control.operation = unknown  # type: ignore[method-assign]
    answer = served.ask("GET", "/admin/v1/operations/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "operation 'nothing' is unknown"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"plan": "p.json"}, "tag"),
        ({"tag": "e4"}, "plan"),
        ({**ADD, "extra": 1}, "extra"),
        ({**ADD, "tag": ""}, "tag"),
        ({**ADD, "tag": "x" * 257}, "tag"),
        ({**ADD, "tag": 4}, "tag"),
        ({**ADD, "plan": ["p.json"]}, "plan"),
        ([ADD], None),
        (None, None),
    ],
)
def test_a_malformed_request_is_400_and_names_the_field(
    served: Served, body: Any, param: str | None
) -> None:
    answer = served.ask("POST", "/admin/v1/variants", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", param, 400)
    assert served.control.calls == []


def test_text_that_is_no_json_is_400_and_not_repeated(served: Served) -> None:
    headers = {**BEARER, "Content-Type": "application/json"}
    answer = served.ask("POST", "/admin/v1/swap", content=b'{"variant": hush}', headers=headers)
    assert answer.status_code == 400
    assert "hush" not in answer.text


def test_an_idempotency_key_has_a_bound(served: Served) -> None:
    headers = {**BEARER, "Idempotency-Key": "x" * 256}
    answer = served.ask("POST", "/admin/v1/rollback", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Idempotency-Key"


def test_a_plan_outside_the_roots_never_reaches_the_control_plane(served: Served) -> None:
    for plan in ("/etc/passwd", "../p.json", "missing.json"):
        answer = served.ask("POST", "/admin/v1/variants", json={**ADD, "plan": plan})
        assert answer.status_code == 422
        assert plan in answer.json()["error"]["message"]
    assert served.control.calls == []


# Audit.


def test_each_mutation_is_recorded_before_and_after(served: Served) -> None:
    def asked_already() -> None:
        assert served.audited()[-1]["event"] == "asked"

    served.control.before_answer = asked_already
    answer = served.ask(
        "POST", "/admin/v1/variants", json=ADD, headers={**BEARER, "Idempotency-Key": "once"}
    )
    asked, answered = served.audited()
    assert asked["parameters"] == {**ADD, "idempotency_key": "once"}
    assert (asked["method"], asked["path"]) == ("POST", "/admin/v1/variants")
    assert asked["remote"] == "127.0.0.1"
    assert len(asked["who"]) == 8
    assert answered["id"] == asked["id"]
    assert (answered["status"], answered["operation"]) == (202, answer.json()["id"])


def test_reading_and_refusals_are_not_recorded(served: Served) -> None:
    for method, path in READS[:2]:
        served.ask(method, path)
    served.ask("POST", "/admin/v1/rollback", headers={})
    served.ask("POST", "/admin/v1/swap", json={})
    assert served.audited() == []


def test_what_cannot_be_recorded_is_not_done(served: Served) -> None:
    with sqlite3.connect(served.folder / DATABASE) as connection:
        connection.execute("DROP TABLE audit")
    for method, path, body in MUTATIONS[:4]:
        answer = served.ask(method, path, json=body)
        assert answer.status_code == 503
        assert "nothing was changed" in answer.json()["error"]["message"]
    assert served.control.calls == []
    assert served.ask("GET", "/admin/v1/variants").status_code == 200


# Probes and documents.


def test_readiness_follows_the_variants_and_liveness_does_not(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served.ask("GET", "/ready").json() == {"ready": True}
    served.control.ready = False
    assert served.ask("GET", "/ready").status_code == 503
    served.control.error = EngineError("dead")
    answer = served.ask("GET", "/ready")
    assert (answer.status_code, answer.json()) == (503, {"ready": False})

    async def never() -> Any:
        import asyncio

        await asyncio.Event().wait()

    monkeypatch.setattr(admin_api, "READY_TIMEOUT", 0.01)
    served.control.status = never  # type: ignore[method-assign]
    assert served.ask("GET", "/ready").status_code == 503
    assert served.ask("GET", "/health").json() == {"status": "ok"}


def test_metrics_are_fresh_at_every_scrape(served: Served) -> None:
    def page(accept: str = "") -> Any:
        return served.ask("GET", "/metrics", headers={"Accept": accept})

    assert 'liveprune_variant_row_bytes{model="tiny",variant="tiny:full"} 2400.0' in page().text
    assert page().headers["content-type"].startswith("text/plain")
    served.control.known = [view("e4", row_bytes=7)]
    text = page("application/openmetrics-text; version=1.0.0").text
    assert 'variant="tiny:full"' not in text
    assert 'liveprune_variant_row_bytes{model="tiny",variant="tiny:e4"} 7.0' in text
    assert text.endswith("# EOF\n")


def test_the_openapi_document_says_what_a_client_needs(served: Served) -> None:
    document = served.ask("GET", "/openapi.json").json()
    swap = document["paths"]["/admin/v1/swap"]["post"]
    assert swap["operationId"] == "swap"
    assert swap["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/Swap")
    shown = swap["responses"]
    assert shown["202"]["content"]["application/json"]["schema"]["$ref"].endswith("/OperationBody")
    for status in ("400", "403", "404", "409", "422", "503"):
        assert shown[status]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    assert [p["name"] for p in swap["parameters"]] == ["Idempotency-Key"]
    assert swap["security"] == [{"HTTPBearer": []}, {"APIKeyHeader": []}]
    schemas = document["components"]["schemas"]
    assert schemas["Swap"]["additionalProperties"] is False
    assert schemas["State"]["enum"] == [state.value for state in State]
