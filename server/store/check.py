"""Does everything that the store counts on exist, and is it what it says?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from liveprune.pruning.errors import PlanError
from liveprune.server.store.jobs import JobState
from liveprune.server.store.store import Store


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    what: str
    """In one line."""
    harmless: bool = False
    """Left over by a crash, and only in the way."""


def check(store: Store) -> list[Finding]:
    """Look at database and files; changes nothing."""
    return [*_database(store), *_variants(store), *_servers(store), *_jobs(store), *_files(store)]


def repair(store: Store) -> list[str]:
    """Delete the plan files that nothing counts on. No server may use the store meanwhile.

    Returns:
        Their digests.
    """
    left = sorted(set(store.plans.digests()) - store.variants.plans().keys())
    for digest in left:
        store.plans.discard(digest)
    return left


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
    for job in store.jobs.list(limit=10_000):
        if (job.state is JobState.RUNNING) != (job.owner is not None):
            yield Finding(f"job {job.id}: is {job.state}, owned by {job.owner or 'nobody'}")
        if job.state.ended != (job.finished is not None):
            yield Finding(f"job {job.id}: is {job.state}, ended at {job.finished}")


def _files(store: Store) -> Iterator[Finding]:
    plans = store.variants.plans()
    for digest in store.plans.digests():
        if digest not in plans:
            yield Finding(f"plan {digest}: no variant has it (--repair deletes it)", harmless=True)
