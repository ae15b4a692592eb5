"""Experiments on a running engine, put together: routed, measured, scored again, decided."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from liveprune.patches.live_engine import VLLMLiveEngine
from liveprune.pruning.errors import ConflictError, StoreError
from liveprune.server.control import Control
from liveprune.server.experiment_promotion import Promoter
from liveprune.server.experiment_service import ExperimentService
from liveprune.server.experiment_worker import ExperimentWorker
from liveprune.server.experiments.live import LiveExperiments
from liveprune.server.fidelity import Fidelity
from liveprune.server.measuring import Measured, Measuring
from liveprune.server.request_metrics import RequestMetrics
from liveprune.server.routing import Routing
from liveprune.server.shadows import Shadows
from liveprune.server.store.store import Store

logger = logging.getLogger("liveprune")


@dataclass(frozen=True)
class Experimenting:
    """What others need of it."""

    service: ExperimentService
    routing: Routing
    requests: RequestMetrics


@contextlib.asynccontextmanager
async def experimenting(
    engine: VLLMLiveEngine,
    control: Control,
    store: Store,
    live: LiveExperiments,
    names: Sequence[str],
    interval: float,
) -> AsyncIterator[Experimenting]:
    """Run experiments until the block is left; those of before a restart go on.

    Args:
        engine: the running one.
        control: its variants, started.
        store: of the model.
        live: what this process routes by.
        names: bare names that the model is served under.
        interval: seconds between two decisions.
    """
    worker = ExperimentWorker(store, live, Promoter(store, control), interval=interval)
    try:
        await worker.load()
    except StoreError as error:  # it was there a moment ago: the next look reads them
        logger.warning("experiments are not run yet: %s", error)
    requests = RequestMetrics(engine.buckets)
    measuring = Measuring(live, requests)
    fidelity = Fidelity(lambda: control.candidates, control.directory, live)
    shadows = Shadows(
        engine.repeat,
        control.directory,
        live,
        closed=lambda: _closed(control),
        answered=fidelity.offer,
    )

    def score_again(request: Measured) -> None:
        assigned = request.assignment
        if assigned is not None and assigned.shadow is None:
            for generation in request.generations[:1]:
                fidelity.offer(assigned, generation.prompt, generation.tokens)

    measuring.listeners += [score_again, shadows.offer]
    async with fidelity.running(), shadows.running():
        with measuring.running():
            worker.start()
            try:
                yield Experimenting(
                    ExperimentService(store, live, worker, control, names),
                    Routing(control.directory, live),
                    requests,
                )
            finally:
                await worker.stop()


def _closed(control: Control) -> bool:
    """Whether background work is off."""
    try:
        return control.candidates.closed
    except ConflictError:  # variants are being restored
        return True
