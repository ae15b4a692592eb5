"""Errors of the admin API: one mapping from the exception tree to HTTP, one body shape (OpenAI's).

Every error that leaves the admin port passes ``status_of`` and ``error_response``, the refusals of
the key check included.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match, Route

from liveprune.pruning.errors import (
    ArchitectureError,
    CheckpointError,
    ConflictError,
    DataError,
    EngineError,
    ExperimentError,
    IncompatibleEnvironmentError,
    LiveprunError,
    PlanError,
    StoreError,
    VariantError,
)
from liveprune.server.store.experiment_rows import UnknownExperimentError
from liveprune.server.store.jobs import UnknownJobError


class UnknownVariantError(VariantError):
    """The request names a variant that is not there."""


class TakenVariantError(VariantError):
    """The request would make a variant under a name that is taken."""


class UnknownOperationError(LiveprunError):
    """The request names an operation that is not remembered."""


class TooManyListenersError(LiveprunError):
    """As many listen to events as there may be."""


STATUS: tuple[tuple[type[Exception], int], ...] = (
    (UnknownVariantError, 404),
    (UnknownOperationError, 404),
    (UnknownJobError, 404),
    (UnknownExperimentError, 404),
    (TakenVariantError, 409),
    (ConflictError, 409),
    (VariantError, 422),
    (PlanError, 422),
    (CheckpointError, 422),
    (DataError, 422),
    (ExperimentError, 422),
    (ArchitectureError, 422),
    (EngineError, 503),
    (StoreError, 503),
    (TooManyListenersError, 503),
    (IncompatibleEnvironmentError, 501),
)
"""The first class that fits decides; anything else is 500."""

_TYPES: dict[int, str] = {
    403: "PermissionDeniedError",
    404: "NotFoundError",
    409: "ConflictError",
    422: "UnprocessableEntityError",
    413: "ContentTooLargeError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


def status_of(error: Exception) -> int:
    """The HTTP status of an error raised on purpose; 500 for any other."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """One error in OpenAI's shape; ``param`` names the field of the request that is at fault."""
    kind = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    body = {"error": {"message": message, "type": kind, "param": param, "code": status}}
    return JSONResponse(body, status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of ``app`` in the one shape."""
    app.add_exception_handler(LiveprunError, _on_purpose)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_exception_handler(Exception, _unexpected)


async def _on_purpose(_: Request, error: Exception) -> JSONResponse:
    return error_response(status_of(error), str(error))


async def _invalid_request(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    # Only where and why: the input itself is not repeated.
    found = [(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors()]
    message = "; ".join(f"{where}: {why}" for where, why in found)
    param = found[0][0].partition(".")[2] if found else ""
    return error_response(400, message, param=param or None)


async def _no_such_route(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    message = f"{request.method} {request.url.path}: {error.detail}"
    headers = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers
    return error_response(error.status_code, message, headers=headers)


def _allowed(request: Request) -> str:
    """All methods of the path; Starlette names those of its first route only."""
    routes = [x for x in request.app.routes if isinstance(x, Route)]
    found = [x.methods or () for x in routes if x.matches(request.scope)[0] is Match.PARTIAL]
    return ", ".join(sorted({method for methods in found for method in methods}))


async def _unexpected(_: Request, error: Exception) -> JSONResponse:
    # Starlette raises it again after this answer, so that the log has the traceback.
    return error_response(500, f"unexpected {type(error).__name__}; the server's log has more")
