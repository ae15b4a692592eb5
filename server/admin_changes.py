"""How the admin API changes something: recorded first, then done, then the outcome recorded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request, Response

from liveprune.pruning.errors import VariantError
from liveprune.server.admin_errors import (
    TakenVariantError,
    UnknownOperationError,
    UnknownVariantError,
    status_of,
)
from liveprune.server.admin_models import OperationBody
from liveprune.server.allowed_paths import AllowedPaths
from liveprune.server.audit import AuditLog, Change
from liveprune.server.control_plane import ControlPlane
from liveprune.server.experiment_service import ExperimentService
from liveprune.server.jobs.service import JobService
from liveprune.server.live_calibration import LiveCalibration
from liveprune.server.live_metrics import LiveMetrics
from liveprune.server.operations import Operation

T = TypeVar("T")


@dataclass(frozen=True)
class Admin:
    """What the routes work with."""

    control: ControlPlane
    audit: AuditLog
    paths: AllowedPaths
    metrics: LiveMetrics
    jobs: JobService | None = None
    """None where there is no store to keep them in."""
    calibration: LiveCalibration | None = None
    """None where live traffic is not counted."""
    experiments: ExperimentService | None = None
    """None where there are no live variants to split traffic over."""

    async def change(
        self,
        request: Request,
        response: Response,
        parameters: Mapping[str, Any],
        run: Callable[[], Awaitable[Operation]],
    ) -> OperationBody:
        """Record, do and record one change that becomes an operation."""
        operation = await self.recorded(request, parameters, run, lambda found: found.id)
        response.headers["Location"] = f"/admin/v1/operations/{operation.id}"
        return OperationBody.of(operation)

    async def recorded(
        self,
        request: Request,
        parameters: Mapping[str, Any],
        run: Callable[[], Awaitable[T]],
        name: Callable[[T], str],
        *,
        status: int = 202,
    ) -> T:
        """Record, do and record one mutation; nothing happens if it cannot be recorded.

        ``name``: the id of what came of it, for the audit log; ``status``: of the answer then.
        """
        asked = Change(
            who=request.state.who,
            remote=request.client.host if request.client else "unknown",
            method=request.method,
            path=request.url.path,
            parameters={key: value for key, value in parameters.items() if value is not None},
        )
        await self.audit.asked(asked)
        try:
            found = await run()
        except Exception as error:
            await self.audit.answered(asked, status_of(error), error=str(error))
            raise
        await self.audit.answered(asked, status, operation=name(found))
        return found

    async def tag(self, name: str) -> str:
        """The tag in ``tag`` or ``name:tag``."""
        model, _, tag = name.rpartition(":")
        if model:
            served = {view.name.rpartition(":")[0] for view in await self.control.variants()}
            if model not in served:
                raise UnknownVariantError(
                    f"variant {name}: found model {model!r}, expected {', '.join(sorted(served))}"
                )
        return tag

    async def existing(self, name: str, run: Callable[[str], Awaitable[Operation]]) -> Operation:
        """Run a change of one variant, with its tag; tell unknown from unfit.

        Asked only after a failure: a mutation that is repeated with its idempotency key must get
        its operation back even when the variant is gone by now.
        """
        tag = await self.tag(name)
        try:
            return await run(tag)
        except VariantError as error:
            if await self._knows(tag):
                raise
            raise UnknownVariantError(str(error)) from error

    async def new(self, name: str, run: Callable[[str], Awaitable[Operation]]) -> Operation:
        """Run the making of one variant, with its tag; tell taken from unfit."""
        tag = await self.tag(name)
        try:
            return await run(tag)
        except VariantError as error:
            if await self._knows(tag):
                raise TakenVariantError(str(error)) from error
            raise

    async def _knows(self, tag: str) -> bool:
        return any(view.tag == tag for view in await self.control.variants())

    def operation(self, operation_id: str) -> Operation:
        """One operation.

        Raises:
            UnknownOperationError: it is not remembered.
        """
        try:
            operation = self.control.operation(operation_id)
        except VariantError as error:
            raise UnknownOperationError(str(error)) from error
        if operation is None:
            raise UnknownOperationError(f"operation {operation_id} is unknown, or ended long ago")
        return operation
