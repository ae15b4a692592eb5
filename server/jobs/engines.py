"""The engine that scores a job's plans: the one that serves, or one of the job's own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from liveprune.pruning.evaluation.engine import Engine
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.search.presets import Settings
from liveprune.server.jobs.assignment import Assignment
from liveprune.server.jobs.request import JobRequest
from liveprune.server.search_engines import engine_name as described_name
from liveprune.server.search_engines import search_engine
from liveprune.server.search_options import SearchOptions
from liveprune.server.server_engine import ServerEngine

LIVE_TOKENS = 1 << 13
"""Of one call to the serving engine: little is lost when users, or an operation, interrupt it."""


@contextmanager
def job_engine(
    request: JobRequest,
    assignment: Assignment,
    settings: Settings,
    kept: Sequence[int],
    longest: int,
) -> Iterator[Engine]:
    """Yield the engine that the request names.

    Args:
        request: of the job.
        assignment: where the serving engine is.
        settings: of the search; for one-pass methods the defaults.
        kept: experts that a candidate keeps, by layer.
        longest: tokens of the longest text.

    Raises:
        EngineError: the serving engine cannot be reached, or serves another model.
        IncompatibleEnvironmentError: Ray, or its cluster, is not there.
    """
    base = Path(assignment.base)
    if request.engine == "live":
        with ServerEngine(
            assignment.admin_url,
            assignment.admin_key,
            base,
            key_source="the server",
            patience=math.inf,  # users may keep it waiting for as long as they like
            tokens=LIVE_TOKENS,
        ) as server:
            yield server
        return
    options = _options(request, assignment, settings)
    with search_engine(options, ModelSpec.from_path(base), kept, longest) as engine:
        yield engine


def engine_name(request: JobRequest, assignment: Assignment, settings: Settings) -> str:
    """What computes; a search goes on with the same one only."""
    if request.engine == "live":
        return "server"
    return described_name(_options(request, assignment, settings))


def _options(request: JobRequest, assignment: Assignment, settings: Settings) -> SearchOptions:
    return SearchOptions(
        model=Path(assignment.base),
        folder=assignment.folder,
        train=assignment.folder,
        experts="",
        settings=settings,
        engine=request.engine,
        actors=request.actors,
        ray_address=request.ray_address,
    )
