"""The admin API keeps to its OpenAPI document, whatever it is sent."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import booleans
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.demo import model_path, rows_path
from liveprune.server.admin_api import OPEN_PATHS, make_app
from liveprune.server.admin_key import key_digest
from liveprune.server.admin_models import ErrorBody
from liveprune.server.audit import AuditLog
from liveprune.server.experiment_promotion import Promoter
from liveprune.server.experiment_service import ExperimentService
from liveprune.server.experiment_worker import ExperimentWorker
from liveprune.server.experiments.live import LiveExperiments
from liveprune.server.jobs.background import Background, NoLiveBackground
from liveprune.server.layer_views import LayerView
from liveprune.server.live_calibration import LiveCalibration
from liveprune.server.operations import Operation, State
from liveprune.server.registry import Registry
from liveprune.server.store.store import Store
from tests.server.fake_control import BEARER, KEY, FakeControl, ask, view
from tests.server.fake_engine import FakeEngine, fake_base
from tests.server.jobs.job_world import stored
from tests.server.test_live_calibration import counts

BOTH = {**BEARER, "X-API-Key": KEY}
"""The second instead of what is made up for it: where both are given, both must be right."""
EXAMPLES = 8
"""Requests of each kind to each operation."""
ALWAYS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
METHODS = ("GET", "PUT", "POST", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE")
DATA = rows_path("sort", "train").resolve()
JOB = {"method": "reap", "source": {"data": str(DATA)}, "experts": "4", "target_memory": None}
LAYER = LayerView(0, 8, 4, 2, kept=(0, 1, 2), merged=(3, 4), constant=(5,))
EXPERIMENT: dict[str, Any] = {
    "name": "halve",
    "arms": [
        {"name": "full", "variant": "full", "weight": 0.5},
        {"name": "pruned", "variant": "e4", "weight": 0.5},
    ],
    "control": "full",
    "primary": {"metric": "e2e_seconds"},
    "guardrails": [{"metric": "loop", "margin": 0.2}],
}
KNOWN_BODIES = {
    "/admin/v1/jobs": JOB,
    "/admin/v1/experiments": {**EXPERIMENT, "name": "other"},
    "/admin/v1/experiments/check": {**EXPERIMENT, "name": "other"},
    "/admin/v1/swap": {"variant": "e4"},
    "/admin/v1/variants": {"plan": "p.json"},
}
"""What is there, in the place of something made up that is not."""


def documented() -> dict[str, dict[str, Any]]:
    """Operations by path and method, of an app that is only looked at."""
    app = make_app(FakeControl(), keys=lambda: (), audit=cast("Any", None), roots=[])
    paths = app.openapi()["paths"].items()
    return {path: {name.upper(): x for name, x in found.items()} for path, found in paths}


PATHS = documented()
CLOSED = [path for path in PATHS if path not in OPEN_PATHS]


@dataclass(frozen=True)
class Site:
    """An app, its document, and parts of paths that name something in it."""

    app: FastAPI
    document: Any
    known: Mapping[str, str]


def make_site(folder: Path, store: Store) -> Site:
    """The admin app with everything that it can have; nobody does its jobs."""
    control = FakeControl(known=[view("full"), view("e4")], kept={"full": [LAYER], "e4": [LAYER]})
    operation = Operation("swap", "tiny:e4", state=State.FILLING)
    control.made[operation.id] = operation
    (folder / "p.json").write_text("{}")
    roots = [folder, DATA.parent]
    engine = FakeEngine(fake_base(folder / "base"))
    registry = Registry("m", [], engine.spec, 4)
    registry.adopt(registry.known["full"], 0)
    engine.counts = {"base": counts(100)}
    background = Background(
        store,
        model_path(),
        control,
        roots,
        admin_url="http://nowhere",
        engine=NoLiveBackground(),
        prompts=folder / "prompts",
    )
    live = LiveExperiments(store.salt(), time.time)
    worker = ExperimentWorker(store, live, Promoter(store, control), interval=60)
    experiments = ExperimentService(store, live, worker, control, ["tiny"])
    asyncio.run(experiments.start(EXPERIMENT, key=None))
    job = store.jobs.add(stored().model_dump(mode="json"))
    known = {"job_id": job.id, "operation_id": operation.id, "tag": "e4", "name": "halve"}
    app = make_app(
        control,
        keys=background.keys(lambda: [key_digest(KEY)]),
        audit=AuditLog(store),
        roots=roots,
        jobs=background.jobs,
        experiments=experiments,
        calibration=LiveCalibration(engine, registry, folder, "print"),
    )
    document = schemathesis.openapi.from_asgi("/openapi.json", app, headers=BOTH)
    return Site(app, document, known)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    store = Store(folder, fingerprint_model(model_path()), replica="here")
    yield make_site(folder, store)
    store.close()


def kinds() -> Iterator[tuple[str, str, GenerationMode]]:
    for path, methods in PATHS.items():
        for method, described in methods.items():
            yield method, path, GenerationMode.POSITIVE
            if "requestBody" in described or "parameters" in described:
                yield method, path, GenerationMode.NEGATIVE


@pytest.mark.parametrize(("method", "path", "mode"), list(kinds()))
def test_answers_are_the_documented_ones(
    site: Site, method: str, path: str, mode: GenerationMode
) -> None:
    operation = schemathesis.openapi.from_asgi("/openapi.json", site.app, headers=BOTH)[path][
        method
    ]
    expected = [*ALWAYS, checks.negative_data_rejection] if mode.is_negative else ALWAYS

    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), known=booleans())
    def every(case: Case, known: bool) -> None:
        if known and not mode.is_negative:
            case.path_parameters = {
                name: site.known.get(name, value) for name, value in case.path_parameters.items()
            }
            if path in KNOWN_BODIES and method == "POST":
                case.body = {**case.body, **KNOWN_BODIES[path]}
        answer = case.call(headers=BOTH)
        assert answer.status_code != 403
        case.validate_response(answer, checks=expected, headers=BOTH)

    every()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"X-API-Key": ""}])
@pytest.mark.parametrize("path", CLOSED)
def test_without_the_key_nothing_answers(site: Site, path: str, headers: dict[str, str]) -> None:
    for method in (*PATHS[path], "PATCH"):
        answer = ask(site.app, method, path, headers=headers)
        assert answer.status_code == 403
        error = ErrorBody.model_validate(answer.json()).error
        assert (error.code, error.type) == (403, "PermissionDeniedError")


@pytest.mark.parametrize("path", PATHS)
def test_methods_that_are_not_documented(site: Site, path: str) -> None:
    # `x/{name}` is also there where the path is `x/check`, and a tag may hold slashes.
    forms = {x: re.sub("{[^}]+}", "[^/]+", x.replace("{tag}", ".+")) for x in PATHS}
    same = [found for found, form in forms.items() if re.fullmatch(form, path)]
    allowed = {method for found in same for method in PATHS[found]}
    for method in set(METHODS) - allowed:
        answer = ask(site.app, method, path)
        assert answer.status_code == 405, method
        assert set(answer.headers["allow"].split(", ")) == allowed
        if method != "HEAD":
            assert ErrorBody.model_validate(answer.json()).error.code == 405


def test_numbers_beyond_those_of_a_database(site: Site) -> None:
    path = "/admin/v1/experiments/halve/decisions"
    assert ask(site.app, "GET", f"{path}/{(1 << 63) - 1}").status_code == 404
    assert ask(site.app, "GET", f"{path}/{1 << 63}").status_code == 400
