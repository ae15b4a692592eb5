"""Routes of the admin API that show the statistics of live traffic; they change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from liveprune.pruning.errors import IncompatibleEnvironmentError
from liveprune.server.live_calibration import LiveCalibration
from liveprune.server.variant import FULL

router = APIRouter()


class DriftBody(BaseModel):
    """Jensen-Shannon divergence to base 2, 0 to 1, of usage now and in calibration."""

    mean: float
    max: float
    layers: Mapping[int, float]


class UsageBody(BaseModel):
    """Quantiles over a layer's experts of the share of its choices that one gets."""

    p10: float
    p50: float
    p90: float
    max: float
    unused: int


class StatisticsBody(BaseModel):
    """What requests to the bare model name used lately; older tokens weigh less."""

    tokens: Mapping[str, float]
    """Of each variant that answered."""
    serving: str
    layers: Mapping[int, UsageBody]
    """Of the variant that serves."""
    drift: DriftBody | None
    why_no_drift: str


@router.get("/statistics")
async def get_statistics(request: Request) -> StatisticsBody:
    """Tokens counted, the use of experts, and the drift from what was calibrated."""
    calibration = _calibration(request)
    await calibration.poll()
    found = calibration.summary()
    moved = found.drift
    return StatisticsBody(
        tokens=found.variants,
        serving=found.serving,
        layers={index: UsageBody(**vars(layer)) for index, layer in found.layers.items()},
        drift=None
        if moved is None
        else DriftBody(mean=moved.mean, max=moved.maximum, layers=moved.layers),
        why_no_drift=found.why_no_drift,
    )


@router.get("/statistics/file", response_class=Response)
async def get_statistics_file(
    request: Request,
    variant: Annotated[
        str, Query(description="Whose: a tag, or `all` for the sum over plans that only prune.")
    ] = FULL,
) -> Response:
    """The statistics as a file that `liveprune prune --statistics` reads."""
    calibration = _calibration(request)
    await calibration.poll()
    content = await asyncio.to_thread(calibration.statistics(variant).to_bytes)
    return Response(content, media_type="application/octet-stream")


def _calibration(request: Request) -> LiveCalibration:
    found: LiveCalibration | None = request.app.state.admin.calibration
    if found is None:
        raise IncompatibleEnvironmentError(
            "live statistics are off in this server: it was started with --no-live-statistics, or "
            "its variants need restarts (rebuild mode)"
        )
    return found
