"""Prometheus metrics of the live variants: gauges of now, and counts of operations that ended.

Everything is computed from snapshots of the control plane by one collector. So the series of a
variant that is no longer live are gone at the next scrape, and nothing is written to the shared
files of prometheus_client's multiprocess mode. vLLM's public ``/metrics`` shows the same series
while ``published`` holds, unless vLLM runs several API processes: there it collects from those
files alone, and only the admin port shows ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from liveprune.pruning.errors import LiveprunError
from liveprune.server.calibration_metrics import calibration_metrics
from liveprune.server.control_plane import ControlPlane
from liveprune.server.experiment_metrics import experiment_metrics
from liveprune.server.experiment_models import ExperimentBody
from liveprune.server.histogram import Histogram
from liveprune.server.job_metrics import job_metrics
from liveprune.server.live_calibration import LiveCalibration
from liveprune.server.operations import Operation, State, Status
from liveprune.server.request_metrics import RequestMetrics, request_metrics
from liveprune.server.store.jobs import Job

REFRESH_SECONDS = 10.0
STATUS_TIMEOUT = 10.0
"""Seconds; a scrape must end even if the engine does not answer."""
BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Seconds of a swap, draining included."""
OUTCOMES = (State.DONE, State.FAILED, State.CANCELLED)
_SWAPS = ("swap", "rollback")
_LIVE = ("live", "draining")

_ENGINE_GAUGES: tuple[tuple[str, str, Callable[[Status], int | None]], ...] = (
    ("liveprune_expert_bytes", "Resident rows of base experts.", lambda s: s.expert_bytes),
    ("liveprune_spare_bytes", "Resident spare rows (merged experts).", lambda s: s.spare_bytes),
    (
        "liveprune_other_weight_bytes",
        "Weights that are not expert rows.",
        lambda s: s.other_weight_bytes,
    ),
    ("liveprune_kv_cache_bytes", "KV cache that the scheduler may use.", lambda s: s.kv_bytes),
    ("liveprune_kv_cache_blocks", "Blocks that the scheduler may use.", lambda s: s.kv_blocks),
    (
        "liveprune_process_resident_bytes",
        "Memory of the engine's workers, as the operating system counts it.",
        lambda s: s.process_bytes,
    ),
    (
        "liveprune_memory_target_bytes",
        "Bound of experts, spare rows, other weights and KV cache.",
        lambda s: s.memory_target_bytes,
    ),
    (
        "liveprune_operation_in_progress",
        "1 while an operation is under way.",
        lambda s: int(s.operation is not None and not s.operation.state.ended),
    ),
)

logger = logging.getLogger("liveprune.metrics")
T = TypeVar("T")
Ask = Callable[[], Awaitable[Sequence[T]]]


class LiveMetrics:
    """A prometheus_client collector over the last snapshot."""

    def __init__(
        self,
        control: ControlPlane,
        calibration: LiveCalibration | None = None,
        jobs: Ask[Job] | None = None,
        requests: RequestMetrics | None = None,
        experiments: Ask[ExperimentBody] | None = None,
    ) -> None:
        """``jobs``, ``experiments``: ask the store for them; None where there are none."""
        self._control, self._calibration, self._requests = control, calibration, requests
        self._ask_jobs, self._ask_experiments = jobs, experiments
        self._jobs: Sequence[Job] = ()
        self._experiments: Sequence[ExperimentBody] = ()
        self._status: Status | None = None
        self._model: str | None = None
        self._swaps = {outcome: Histogram(BUCKETS) for outcome in OUTCOMES}
        self._counted: set[str] = set()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    async def refresh(self) -> None:
        """Take a new snapshot; an engine that does not answer leaves no gauges, but the counts."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT):
                self._status = await self._control.status()
            self._model = self._status.model
            if self._requests is not None:
                self._requests.keep({x.name for x in self._status.variants if x.state in _LIVE})
        except Exception as error:  # noqa: BLE001 - a scrape survives whatever the engine does
            logger.warning("no metrics of the engine: %s: %s", type(error).__name__, error)
            self._status = None
        self._count(self._control.operations())
        self._jobs = await _asked("jobs", self._ask_jobs)
        self._experiments = await _asked("experiments", self._ask_experiments)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The metrics as text, and its content type; ``accept`` is the request's header."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self._registry), content_type

    def describe(self) -> list[Metric]:
        """All families without samples: what a registry checks for names that clash."""
        return [
            *_variant_metrics(None),
            *_engine_metrics(None),
            *self._operation_metrics(None),
            *calibration_metrics(None, None),
            *job_metrics(None, ()),
            *request_metrics(None, None),
            *experiment_metrics(None, ()),
        ]

    def collect(self) -> Iterator[Metric]:
        """All families with the samples of the last snapshot."""
        status = self._status
        yield from _variant_metrics(status)
        yield from _engine_metrics(status)
        yield from self._operation_metrics(self._model)
        yield from calibration_metrics(self._calibration, self._model)
        yield from job_metrics(self._model, self._jobs)
        yield from request_metrics(self._requests, self._model)
        yield from experiment_metrics(self._model, self._experiments)

    def _count(self, operations: Sequence[Operation]) -> None:
        """Count each operation once, when it has ended."""
        ended = [operation for operation in operations if operation.state.ended]
        for operation in ended:
            if operation.id in self._counted:
                continue
            if operation.kind in _SWAPS:
                finished = operation.created if operation.finished is None else operation.finished
                self._swaps[operation.state].observe(max(0.0, finished - operation.created))
        self._counted = {operation.id for operation in ended}

    def _operation_metrics(self, model: str | None) -> Iterator[Metric]:
        swaps = CounterMetricFamily(
            "liveprune_swaps_total",
            "Swaps and roll-backs that ended.",
            labels=("model", "outcome"),
        )
        durations = HistogramMetricFamily(
            "liveprune_swap_duration_seconds",
            "Swaps and roll-backs from request to end, draining included.",
            labels=("model", "outcome"),
        )
        mismatches = CounterMetricFamily(
            "liveprune_canary_mismatches_total",
            "Times that golden answers differed from those of before.",
            labels=("model",),
        )
        if model is not None:
            for outcome, seen in self._swaps.items():
                buckets = seen.cumulated()
                swaps.add_metric((model, outcome.value), buckets[-1][1])
                durations.add_metric((model, outcome.value), buckets, seen.total)
            mismatches.add_metric((model,), self._control.golden_mismatches)
        yield from (swaps, durations, mismatches)


async def _asked(what: str, ask: Ask[T] | None) -> Sequence[T]:
    if ask is None:
        return ()
    try:
        return await ask()
    except LiveprunError as error:
        logger.warning("no metrics of %s: %s", what, error)
        return ()


def _variant_metrics(status: Status | None) -> Iterator[Metric]:
    labels = ("model", "variant")
    info = InfoMetricFamily(
        "liveprune_variant",
        "A live variant: experts kept and active per layer, digest of its plan.",
        labels=labels,
    )
    rows = GaugeMetricFamily(
        "liveprune_variant_row_bytes",
        "Expert rows that the variant needs; variants share rows, so these do not add up.",
        labels=labels,
    )
    in_flight = GaugeMetricFamily(
        "liveprune_variant_requests_in_flight",
        "Requests that the variant is answering.",
        labels=labels,
    )
    if status is not None:
        for view in status.variants:
            if view.state in _LIVE:
                values = (status.model, view.name)
                facts = {"experts": _span(view.experts), "top_k": _span(view.top_k)}
                info.add_metric(values, {**facts, "digest": view.digest or ""})
                rows.add_metric(values, view.row_bytes)
                in_flight.add_metric(values, view.in_flight)
    yield from (info, rows, in_flight)


def _engine_metrics(status: Status | None) -> Iterator[Metric]:
    for name, documentation, read in _ENGINE_GAUGES:
        gauge = GaugeMetricFamily(name, documentation, labels=("model",))
        if status is not None and (value := read(status)) is not None:
            gauge.add_metric((status.model,), value)
        yield gauge


def _span(counts: Mapping[str, int]) -> str:
    low, high = counts["min"], counts["max"]
    return str(low) if low == high else f"{low}-{high}"


@contextlib.asynccontextmanager
async def published(
    metrics: LiveMetrics,
    registry: CollectorRegistry = REGISTRY,
    every: float = REFRESH_SECONDS,
) -> AsyncIterator[None]:
    """Show ``metrics`` on vLLM's public page too, refreshed every so many seconds."""

    async def refresh() -> None:
        while True:
            await metrics.refresh()
            await asyncio.sleep(every)

    registry.register(metrics)
    task = asyncio.create_task(refresh())
    try:
        yield
    finally:
        registry.unregister(metrics)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
