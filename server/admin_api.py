"""The admin API: routes under ``/admin/v1`` over a control plane, and the open probes.

``make_app`` puts the parts together: keys (``admin_auth``), audit log, allowed paths, errors,
metrics. Nothing here knows vLLM.
"""

from __future__ import annotations

import asyncio
import importlib.metadata as metadata
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.responses import JSONResponse

from liveprune.pruning.errors import LiveprunError, VariantError
from liveprune.server import (
    admin_candidates,
    admin_events,
    admin_experiments,
    admin_jobs,
    admin_statistics,
)
from liveprune.server.admin_auth import AdminGate
from liveprune.server.admin_changes import Admin
from liveprune.server.admin_dashboard import add_dashboard
from liveprune.server.admin_errors import UnknownVariantError, add_error_handlers
from liveprune.server.admin_events import event_sources
from liveprune.server.admin_models import (
    AddVariant,
    Alive,
    ErrorBody,
    OperationBody,
    OperationList,
    PlanBody,
    Ready,
    StatusBody,
    Swap,
    VariantBody,
    VariantList,
)
from liveprune.server.allowed_paths import AllowedPaths
from liveprune.server.audit import AuditLog
from liveprune.server.body_limit import BodyLimit
from liveprune.server.control_plane import ControlPlane
from liveprune.server.event_feed import EventFeed
from liveprune.server.experiment_service import ExperimentService
from liveprune.server.jobs.service import JobService
from liveprune.server.live_calibration import LiveCalibration
from liveprune.server.live_metrics import LiveMetrics
from liveprune.server.operations import Operation

__all__ = ["ControlPlane", "make_app"]

OPEN_PATHS = ("/health", "/ready", "/metrics")
"""Paths that need no key, beside the page's files: they tell probes and Prometheus how the server
is, nothing else."""
READY_TIMEOUT = 5.0
"""Seconds; an engine that does not answer by then is not ready."""

logger = logging.getLogger("liveprune.admin")


def _admin(request: Request) -> Admin:
    admin: Admin = request.app.state.admin
    return admin


AdminDependency = Annotated[Admin, Depends(_admin)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="A repeated request with the same key gets the first one's operation.",
    ),
]
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The request is malformed.",
        403: "The admin key is missing or wrong.",
        404: "What the request names is unknown.",
        409: "Another operation is in the way, it is too late, or the name is taken.",
        413: "The body is too long.",
        422: "What was sent is unusable: a plan, rows, an experiment's definition.",
        500: "A defect of the server; its log has more.",
        501: "The engine cannot do this at all.",
        503: "The engine or the audit log failed.",
    }.items()
}

router = APIRouter()
probes = APIRouter()


@router.get("/variants")
async def list_variants(admin: AdminDependency) -> VariantList:
    """All variants, live or not."""
    views = await admin.control.variants()
    return VariantList(variants=[VariantBody.of(view) for view in views])


@router.post("/variants", status_code=202)
async def add_variant(
    body: AddVariant,
    admin: AdminDependency,
    request: Request,
    response: Response,
    key: IdempotencyKey = None,
) -> OperationBody:
    """Make a plan live under a new name; nothing routes to it yet but its own name."""

    async def run(tag: str) -> Operation:
        plan = await asyncio.to_thread(admin.paths.plan, body.plan)
        return await admin.control.add(tag, plan, idempotency_key=key)

    parameters = {**body.model_dump(), "idempotency_key": key}
    return await admin.change(request, response, parameters, lambda: admin.new(body.tag, run))


@router.delete("/variants/{tag:path}", status_code=202)
async def remove_variant(
    tag: str,
    admin: AdminDependency,
    request: Request,
    response: Response,
    key: IdempotencyKey = None,
) -> OperationBody:
    """Take a variant out of service; its streams end on it."""

    async def run(found: str) -> Operation:
        return await admin.control.remove(found, idempotency_key=key)

    parameters = {"tag": tag, "idempotency_key": key}
    return await admin.change(request, response, parameters, lambda: admin.existing(tag, run))


@router.get("/variants/{tag:path}/plan")
async def get_plan(tag: str, admin: AdminDependency) -> PlanBody:
    """What a variant leaves of each layer's experts."""
    found = await admin.tag(tag)
    try:
        return PlanBody.of(await admin.control.layers(found))
    except VariantError as error:
        raise UnknownVariantError(str(error)) from error


@router.post("/swap", status_code=202)
async def swap(
    body: Swap,
    admin: AdminDependency,
    request: Request,
    response: Response,
    key: IdempotencyKey = None,
) -> OperationBody:
    """Send the requests of the bare name to another variant, under traffic."""

    async def run(tag: str) -> Operation:
        return await admin.control.swap(tag, keep_previous=body.keep_previous, idempotency_key=key)

    parameters = {**body.model_dump(), "idempotency_key": key}
    return await admin.change(
        request, response, parameters, lambda: admin.existing(body.variant, run)
    )


@router.post("/rollback", status_code=202)
async def rollback(
    admin: AdminDependency, request: Request, response: Response, key: IdempotencyKey = None
) -> OperationBody:
    """Return to the variant before."""
    return await admin.change(
        request,
        response,
        {"idempotency_key": key},
        lambda: admin.control.rollback(idempotency_key=key),
    )


@router.get("/operations")
async def list_operations(admin: AdminDependency) -> OperationList:
    """Operations under way, and those that ended a while ago."""
    found = admin.control.operations()
    return OperationList(operations=[OperationBody.of(operation) for operation in found])


@router.get("/operations/{operation_id}")
async def get_operation(operation_id: str, admin: AdminDependency) -> OperationBody:
    """One operation."""
    return OperationBody.of(admin.operation(operation_id))


@router.post("/operations/{operation_id}/cancel", status_code=202)
async def cancel_operation(
    operation_id: str, admin: AdminDependency, request: Request, response: Response
) -> OperationBody:
    """Give up an operation; possible until its state is `switching`."""

    async def run() -> Operation:
        return await admin.control.cancel(admin.operation(operation_id).id)

    return await admin.change(request, response, {"operation": operation_id}, run)


@router.get("/status")
async def get_status(admin: AdminDependency) -> StatusBody:
    """The engine's memory, its variants and what is going on."""
    return StatusBody.of(await admin.control.status())


@probes.get("/health")
async def health() -> Alive:
    """Liveness: answers while the process does, whatever the engine is doing."""
    return Alive(status="ok")


@probes.get("/ready", responses={503: {"model": Ready}})
async def ready(admin: AdminDependency) -> JSONResponse:
    """Readiness: 200 if some variant can answer, else 503."""
    try:
        async with asyncio.timeout(READY_TIMEOUT):
            answers = (await admin.control.status()).ready
    except (LiveprunError, TimeoutError) as error:
        logger.warning("not ready: %s: %s", type(error).__name__, error)
        answers = False
    return JSONResponse({"ready": answers}, 200 if answers else 503)


@probes.get("/metrics", include_in_schema=False)
async def metrics(admin: AdminDependency, request: Request) -> Response:
    """Liveprune's own metrics for Prometheus."""
    await admin.metrics.refresh()
    page, content_type = admin.metrics.page(request.headers.get("accept", ""))
    return Response(page, media_type=content_type)


def make_app(
    control: ControlPlane,
    *,
    keys: Callable[[], Sequence[bytes]],
    audit: AuditLog,
    roots: Sequence[Path],
    metrics: LiveMetrics | None = None,
    jobs: JobService | None = None,
    calibration: LiveCalibration | None = None,
    experiments: ExperimentService | None = None,
) -> FastAPI:
    """Put the admin app together.

    Args:
        control: the live variants.
        keys: digests of the keys that open, asked at every request (``admin_key.server_keys``).
        audit: where mutations are recorded.
        roots: folders that plans may lie in (``allowed_paths.default_roots``).
        metrics: those that the public port shows as well; None makes some for this app alone.
        jobs: background jobs; None where there is no store.
        calibration: statistics of live traffic; None where it is not counted.
        experiments: None where there are no live variants.
    """
    app = FastAPI(
        title="Liveprune admin API",
        version=metadata.version("liveprune"),
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    shown = metrics or LiveMetrics(control)
    admin = Admin(control, audit, AllowedPaths(roots), shown, jobs, calibration, experiments)
    app.state.admin = admin
    app.state.events = EventFeed(event_sources(admin))
    others = (admin_candidates, admin_events, admin_jobs, admin_statistics, admin_experiments)
    for each in (router, *(module.router for module in others)):
        app.include_router(
            each,
            prefix="/admin/v1",
            responses=_ERRORS,
            # For the OpenAPI document only: AdminGate has checked the key before any route is
            # looked up.
            dependencies=[
                Security(HTTPBearer(auto_error=False)),
                Security(APIKeyHeader(name="X-API-Key", auto_error=False)),
            ],
        )
    app.include_router(probes)
    page = add_dashboard(app)
    app.add_middleware(BodyLimit)
    # The last added is the outermost: nothing of a body is read without a key.
    app.add_middleware(AdminGate, keys=keys, open_paths={*OPEN_PATHS, *page})
    add_error_handlers(app)
    return app
