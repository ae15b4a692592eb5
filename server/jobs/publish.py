"""The last step of a job: its plan becomes a stored variant with lineage and scores.

Files first, then rows; every part may be repeated, so a worker that is killed in the middle does it
again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import LiveprunError
from liveprune.pruning.files import write_atomic
from liveprune.server.admin_client import AdminClient, AdminConflictError
from liveprune.server.jobs.request import StoredRequest
from liveprune.server.jobs.run import Outcome
from liveprune.server.operations import State
from liveprune.server.store.jobs import Job
from liveprune.server.store.store import Store

POLL_SECONDS = 0.5

logger = logging.getLogger("liveprune.jobs")


def publish(
    store: Store,
    client: AdminClient,
    job: Job,
    stored: StoredRequest,
    outcome: Outcome,
    check: Callable[[], None],
    calibrated: Path | None,
) -> dict[str, Any]:
    """Store plan, scores and variant; make it live where that was asked for.

    Args:
        store: of the model.
        client: of the server.
        job: that found the plan.
        stored: its request.
        outcome: what it found.
        check: raises once the job is to stop.
        calibrated: folder that gets the statistics that the plan was made from, to tell how far
            traffic has moved from them; None keeps none.

    Returns:
        The job's result, as JSON: ``digest``, ``tag``, ``experts`` kept in all layers and ``of``
        how many, ``measure``, ``scores`` (``run.Scores`` by set of rows), ``live``; where it could
        not be made live ``live_error`` says why.

    Raises:
        ConflictError: the tag was given to another plan meanwhile.
        OSError: the disk is full.
    """
    plan, request = outcome.plan, stored.request
    size = store.plans.save(plan)
    if calibrated is not None and outcome.statistics is not None:
        write_atomic(calibrated / f"{plan.digest}.safetensors", outcome.statistics.read_bytes())
    _record(store, job, stored, outcome)
    lineage = {
        "method": plan.lineage.method,
        "parameters": dict(plan.lineage.parameters),
        "seed": plan.lineage.seed,
        "calibration": plan.lineage.calibration,
        "versions": dict(plan.lineage.versions),
        "files": dict(stored.digests),
        "source": request.source.model_dump(exclude_none=True),
        "measure": outcome.measure,
        "scores": dict(outcome.scores),
    }
    store.variants.publish(request.tag, plan.digest, size, lineage, job=job.id)
    result: dict[str, Any] = {
        "digest": plan.digest,
        "tag": request.tag,
        "experts": sum(layer.kept_experts for layer in plan.layers),
        "of": sum(layer.experts for layer in plan.layers),
        "measure": outcome.measure,
        "scores": dict(outcome.scores),
        "live": False,
    }
    if request.make_live:
        path = str(store.plans.path(plan.digest).resolve())
        error = _bring(client, request.tag, path, check)
        result |= {"live_error": error} if error else {"live": True}
    return result


def _record(store: Store, job: Job, stored: StoredRequest, outcome: Outcome) -> None:
    there = {(x["name"], x["digest"]) for x in store.evaluations.list(job=job.id)}
    for name, scores in outcome.scores.items():
        about = {"measure": outcome.measure, "data": stored.digests.get(name)}
        for digest, key in ((outcome.plan.digest, "plan"), (None, "full")):
            if (name, digest) not in there:
                store.evaluations.add(name, digest, {**scores[key], **about}, job=job.id)


def _bring(client: AdminClient, tag: str, plan: str, check: Callable[[], None]) -> str:
    """Make the plan live under its tag; why that failed, or nothing.

    The variant is stored by now: whatever happens here, the job has done its work.
    """
    try:
        while True:
            check()
            try:
                operation = client.add(tag, plan)
                break
            except AdminConflictError as error:
                logger.info("not live yet: %s", error)
                time.sleep(POLL_SECONDS)
        while not State(operation["state"]).ended:
            time.sleep(POLL_SECONDS)
            operation = client.operation(operation["id"])
    except LiveprunError as error:
        check()
        return str(error)
    if operation["state"] == State.DONE:
        return ""
    return str(operation["error"] or operation["state"])
