from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from liveprune.pruning.errors import (
    ConflictError,
    DataError,
    EngineError,
    IncompatibleEnvironmentError,
    PlanError,
)
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_io import plan_to_json, save_plan
from liveprune.server import candidate_models
from liveprune.server.body_limit import MAX_BODY
from liveprune.server.candidate_models import MAX_TOKENS, PlanBody
from tests.server.fake_control import BEARER, FakeControl, admin_app, ask, audited
from tests.server.fake_engine import fake_plan
from tests.server.test_candidates import merged

A = fake_plan([0, 1, 2])
ROW = {"prompt": [1, 2], "answer": [3]}
SCORE = "/admin/v1/score"


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest.fixture
def app(control: FakeControl, tmp_path: Path) -> FastAPI:
    return admin_app(control, tmp_path)


def score(app: FastAPI, *plans: Any, **fields: Any) -> httpx.Response:
    return ask(app, "POST", SCORE, json={"plans": plans, "rows": [ROW], **fields})


def test_a_plan_file_of_a_pruning_is_a_body_as_it_is(app: FastAPI, control: FakeControl) -> None:
    answer = score(app, plan_to_json(A), None)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "scores": [
            {"error": None, "predicted": [4], "logprobs": [-0.375], "overlap": None}
            | {"divergence": None},
            {"error": None, "predicted": [3], "logprobs": [-0.375], "overlap": None}
            | {"divergence": None},
        ]
    }
    assert [call[1] for call in control.calls] == [[A.digest, None]]


def test_matrices_as_lists_or_as_base64(app: FastAPI, control: FakeControl, tmp_path: Path) -> None:
    plan = merged(3)
    save_plan(plan, tmp_path / "m.json")
    form = json.loads((tmp_path / "m.json").read_text())
    del form["matrices"]  # the file beside it: here the matrices are in the place of their names
    listed = {**form, "layers": [dict(layer) for layer in form["layers"]]}
    for one, layer in zip(listed["layers"], plan.layers, strict=True):
        for name in ("merge", "router_map"):
            one[name] = getattr(layer, name).tolist()
    packed = PlanBody.of(plan).model_dump(mode="json")
    assert score(app, listed, packed).status_code == 200
    assert control.calls[0][1] == [plan.digest, plan.digest]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"digest": "0" * 32}, "plans.0: plan: content has digest"),
        ({"layers": [{"layer": 0, "experts": 8, "top_k": 9, "kept": [1]}]}, "top_k is 9"),
        (
            {"layers": [{"layer": 0, "experts": 2, "top_k": 1, "merge": [[1, 2], [3]]}]},
            "rows of different lengths",
        ),
        (
            {"layers": [{"layer": 0, "experts": 2, "top_k": 1, "merge": [[1e39, 2]]}]},
            "too large, expected float32",
        ),
        (
            {
                "layers": [
                    {"layer": 0, "experts": 2, "top_k": 1}
                    | {"merge": {"shape": [1, 2], "float32": base64.b64encode(b"1234").decode()}}
                ]
            },
            r"matrix of \(1, 2\)",
        ),
    ],
)
def test_malformed_plans_are_422(
    app: FastAPI, control: FakeControl, change: dict[str, Any], match: str
) -> None:
    answer = score(app, {**plan_to_json(A), **change})
    assert answer.status_code == 422
    with pytest.raises(PlanError, match=match):
        raise PlanError(answer.json()["error"]["message"])
    assert control.calls == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"plans": []}, "plans"),
        ({"plans": [None] * 65}, "plans"),
        ({"plans": [{**plan_to_json(A), "version": 2}]}, "plans.0.version"),
        ({"rows": []}, "rows"),
        ({"rows": [{"prompt": [], "answer": [1]}]}, "rows.0.prompt"),
        ({"rows": [{"prompt": [1], "answer": [-1]}]}, "rows.0.answer.0"),
        ({"other": 1}, "other"),
    ],
)
def test_malformed_requests_are_400(
    app: FastAPI, control: FakeControl, fields: dict[str, Any], param: str
) -> None:
    answer = score(app, None, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert control.calls == []


def test_work_is_bounded(
    app: FastAPI, control: FakeControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate_models, "MAX_TOKENS", 8)
    assert score(app, None, None).status_code == 200
    refused = score(app, None, None, None)
    assert refused.status_code == 400
    assert "found 3 plans x 3 tokens, expected at most 8" in refused.json()["error"]["message"]
    body = {"plans": [None], "prompts": [[1, 2], [3]], "max_tokens": 3}
    refused = ask(app, "POST", "/admin/v1/generate", json=body)
    assert "found 1 plans x 9 tokens" in refused.json()["error"]["message"]
    assert MAX_TOKENS == 1 << 20


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConflictError("swap runs"), 409),
        (DataError("token 9"), 422),
        (EngineError("died"), 503),
        (IncompatibleEnvironmentError("rebuild mode"), 501),
    ],
)
def test_errors_have_their_status(
    app: FastAPI, control: FakeControl, error: Exception, status: int
) -> None:
    control.error = error
    body = {"plans": [None], "prompts": [[1]], "max_tokens": 1}
    for answer in (score(app, None), ask(app, "POST", "/admin/v1/generate", json=body)):
        assert answer.status_code == status
        assert answer.json()["error"]["message"] == str(error)


def test_a_plans_own_error_is_beside_the_others_scores(app: FastAPI, control: FakeControl) -> None:
    control.outcomes[A.digest] = EngineError("no spare rows")
    scores = score(app, PlanBody.of(A).model_dump(mode="json"), None).json()["scores"]
    assert scores[0] == {
        "error": "no spare rows",
        **dict.fromkeys(("predicted", "logprobs", "overlap", "divergence")),
    }
    assert scores[1]["predicted"] == [3]


def test_nothing_is_audited(app: FastAPI, tmp_path: Path) -> None:
    assert score(app, None).status_code == 200
    assert audited(tmp_path) == []


@pytest.mark.parametrize("stated", [True, False])
def test_a_body_that_is_too_long_is_413(
    app: FastAPI, control: FakeControl, *, stated: bool
) -> None:
    read = 0

    async def body() -> Any:
        nonlocal read
        for _ in range(MAX_BODY // (1 << 20) + 8):
            read += 1
            yield b" " * (1 << 20)

    headers = {**BEARER, **({"Content-Length": str(MAX_BODY + 1)} if stated else {})}

    async def send(content: Any, headers: dict[str, str]) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            return await client.post(SCORE, content=content, headers=headers)

    answer = asyncio.run(send(body(), headers))
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert error["type"] == "ContentTooLargeError"
    assert "expected at most 33,554,432" in error["message"]
    assert read <= (0 if stated else MAX_BODY // (1 << 20) + 1)
    assert control.calls == []
    read = 0
    assert asyncio.run(send(body(), {})).status_code == 403
    assert read == 0, "without a key nothing is read"


def test_matrices_keep_every_bit() -> None:
    draw = np.random.default_rng(0)
    plan = merged(2)
    values = draw.standard_normal((2, 8)).astype(np.float32)
    values[0, :3] = [np.float32(1e-45), np.float32(3e38), -0.0]
    assert np.array_equal(
        candidate_models.MatrixBody.of(values).matrix().view("u4"), values.view("u4")
    )
    assert PlanBody.of(plan).plan().digest == plan.digest


def test_plans_of_every_form_pass_unchanged() -> None:
    half = np.full((2, 4), 0.5, np.float32)
    neurons = np.array([[0, 1], [2, -1], [3, 0], [-1, 2]])
    layers = (
        LayerPlan(0, 4, 2, merge=half, expert_map=(0, 1, 1, 0)),
        LayerPlan(1, 4, 3, kept=(2,), constants=np.linspace(-1, 1, 9).reshape(3, 3)),
        LayerPlan(2, 4, 1, kept=(0, 1), neuron_map=neurons, neuron_shares=[0.1, 1, 2, 3]),
    )
    plan = Plan("mixtral", 3, layers, Lineage("test"))
    assert PlanBody.model_validate(PlanBody.of(plan).model_dump(mode="json")).plan() == plan
    body = PlanBody.of(plan).model_dump(mode="json")
    body["layers"][2]["neuron_map"]["int32"] = "AAAA"
    with pytest.raises(PlanError, match=r"matrix of \(4, 2\)"):
        PlanBody.model_validate(body).plan()
