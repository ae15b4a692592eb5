"""Does everything that the store counts on exist, and is it what it says?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from liveprune.pruning.errors import ExperimentError, PlanError
from liveprune.server.store.experiment_rows import ACTIVE, merged, read_running
from liveprune.server.store.jobs import JobState
from liveprune.server.store.store import ALL_JOBS, Store

SETTLED = 3600.0
"""Seconds after which a plan's files are surely counted on, if they ever will be."""
ALL_EXPERIMENTS = 100_000
"""More than there are."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    what: str
    """In one line."""
    harmless: bool = False
    """Left over by a crash, and only in the way."""


def check(store: Store) -> list[Finding]:
    """Look at database and files; changes nothing."""
    looks = (_database, _variants, _servers, _jobs, _experiments, _files)
    return [finding for look in looks for finding in look(store)]


def repair(store: Store, *, age: float = SETTLED) -> list[str]:
    """Delete the plan files that nothing counts on.

    Args:
        store: whose files.
        age: seconds since such a file was written; a newer one may be a variant in the making. 0
            where no server uses the store meanwhile.

    Returns:
        Their names.
    """
    deleted = []
    for file in store.plans.leftovers(store.variants.plans()):
        try:
            if time.time() - file.stat().st_mtime < age:
                continue
            file.unlink()
        except FileNotFoundError:  # a server was faster
            continue
        deleted.append(file.name)
    return deleted


def _database(store: Store) -> Iterator[Finding]:
    for problem in store.integrity():
        yield Finding(f"database: {problem}")


def _variants(store: Store) -> Iterator[Finding]:
    plans = store.variants.plans()
    for tag, variant in store.variants.all().items():
        if variant.digest not in plans:
            yield Finding(f"variant {tag}: its plan {variant.digest} is not on record")
        try:
            store.plans.load(variant.digest)
        except PlanError as error:
            yield Finding(f"variant {tag}: {error}")


def _servers(store: Store) -> Iterator[Finding]:
    known = {"full", *store.variants.all()}
    for replica, state in store.servers.all().items():
        missing = sorted({*state["live"], state["alias"]} - known)
        if missing:
            yield Finding(f"server {replica}: serves {', '.join(missing)}, which are not known")


def _jobs(store: Store) -> Iterator[Finding]:
    for job in store.jobs.list(limit=ALL_JOBS):
        if (job.state is JobState.RUNNING) != (job.owner is not None):
            yield Finding(f"job {job.id}: is {job.state}, owned by {job.owner or 'nobody'}")
        if job.state.ended != (job.finished is not None):
            yield Finding(f"job {job.id}: is {job.state}, ended at {job.finished}")


def _experiments(store: Store) -> Iterator[Finding]:
    known = {found.name: found for found in store.experiments.newest(limit=ALL_EXPERIMENTS)}
    for name, found in known.items():
        if (found.state in ACTIVE) != (found.ended is None):
            yield Finding(f"experiment {name}: is {found.state}, ended at {found.ended}")
        try:
            read_running(found)
            merged(found, store.measurements.of(name).values())
        except ExperimentError as error:
            yield Finding(f"experiment {name}: {error}")
    for name in sorted({*store.measurements.updated(), *store.decisions.newest_ids()} - {*known}):
        yield Finding(f"experiment {name}: was measured or decided on, and is not known")


def _files(store: Store) -> Iterator[Finding]:
    for file in store.plans.leftovers(store.variants.plans()):
        yield Finding(f"{file}: no variant has it (--repair deletes it)", harmless=True)
