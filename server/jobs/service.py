"""What the routes about jobs do: check, queue, look up, cancel; and the switch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import ConflictError, DataError, EngineError
from liveprune.server.admin_errors import TakenVariantError
from liveprune.server.allowed_paths import AllowedPaths
from liveprune.server.control_plane import ControlPlane
from liveprune.server.jobs.assignment import job_folder
from liveprune.server.jobs.checks import Surroundings, check_request
from liveprune.server.jobs.request import JobRequest, StoredRequest
from liveprune.server.jobs.supervisor import LOG_FILE, SWITCH, Supervisor
from liveprune.server.store.jobs import Job
from liveprune.server.store.store import Store

LOG_BYTES = 1 << 16
"""Shown of a log, from its end."""
ALL = 10_000


class JobService:
    """Jobs of one server."""

    def __init__(
        self,
        store: Store,
        base: Path,
        control: ControlPlane,
        paths: AllowedPaths,
        supervisor: Supervisor,
        *,
        why_not_live: Callable[[], str],
        live_statistics: Callable[[], Awaitable[bytes]],
        prompts: Path,
    ) -> None:
        """Args:
        store: of the model.
        base: checkpoint folder of the base model.
        control: the live variants.
        paths: what requests may name.
        supervisor: has the jobs done.
        why_not_live: why plans cannot be tried out on the serving engine; empty if they can.
        live_statistics: gives them as a file's content; DataError or EngineError if there are none.
        prompts: folder of the kept prompts.
        """
        self._store, self._base, self._control = store, base, control
        self._paths, self._supervisor = paths, supervisor
        self._starting = (
            asyncio.Lock()
        )  # of two with one key, or one tag, the second sees the first
        self._why_not_live, self._live_statistics = why_not_live, live_statistics
        self._prompts = prompts

    async def start(self, request: JobRequest, *, key: str | None, who: str) -> Job:
        """Check a request and queue its job; the same ``key`` gives the same job.

        Raises:
            LiveprunError: see ``checks.check_request``.
            ConflictError: the key came with another request.
            StoreError: the store's quota is used up, or its database failed.
        """
        async with self._starting:
            return await self._started(request, key, who)

    async def _started(self, request: JobRequest, key: str | None, who: str) -> Job:
        jobs = await self._jobs()
        if key is not None and (earlier := _earlier(jobs, key)) is not None:
            job, before = earlier
            if before != request.model_dump(mode="json"):
                raise ConflictError(
                    f"idempotency key {key!r}: came with another request, which began job {job.id}"
                )
            return job
        known = {view.tag for view in await self._control.variants()}
        known |= (await asyncio.to_thread(self._store.variants.all)).keys()
        waiting = {StoredRequest.model_validate(job.request).request.tag for job in _open(jobs)}
        if request.tag in known | waiting:
            raise TakenVariantError(
                f"tag: {request.tag!r} is taken, by a variant or by another job's result; "
                "expected another"
            )
        await asyncio.to_thread(self._store.check_room)
        statistics, why = None, ""
        if request.source.statistics is not None:
            try:
                statistics = await self._live_statistics()
            except (DataError, EngineError) as error:
                why = str(error)
        around = Surroundings(
            self._base,
            self._paths,
            tested=await asyncio.to_thread(self._tested),
            why_not_live=self._why_not_live(),
            statistics=statistics,
            why_no_statistics=why,
            prompts=any(self._prompts.glob("*.jsonl")),
        )
        checked = await asyncio.to_thread(check_request, request, around)
        stored = StoredRequest(
            request=checked.request,
            asked=request.model_dump(mode="json"),
            digests=checked.digests,
            key=key,
            who=who,
        )
        job = await asyncio.to_thread(self._store.jobs.add, stored.model_dump(mode="json"))
        self._supervisor.look()
        return job

    async def newest(self) -> list[Job]:
        """The newest first."""
        return await asyncio.to_thread(self._store.jobs.list)

    async def get(self, job_id: str) -> Job:
        """One job; UnknownJobError if there is none."""
        return await asyncio.to_thread(self._store.jobs.get, job_id)

    async def log(self, job_id: str) -> str:
        """The end of its log; empty before it has begun."""
        job = await self.get(job_id)
        return await asyncio.to_thread(_tail, job_folder(self._store.files, job.id) / LOG_FILE)

    async def cancel(self, job_id: str) -> Job:
        """Stop it, now or at its next safe point; ConflictError if it has ended."""
        job = await asyncio.to_thread(self._store.jobs.ask_cancel, job_id)
        self._supervisor.look()
        return job

    async def resume(self, job_id: str) -> Job:
        """Queue it again; ConflictError unless it failed or was cancelled."""
        job = await asyncio.to_thread(self._store.jobs.resume, job_id)
        self._supervisor.look()
        return job

    async def enabled(self) -> bool:
        """Whether background work is on."""
        found: dict[str, Any] = await asyncio.to_thread(
            self._store.settings.get, SWITCH, {"enabled": True}
        )
        return bool(found["enabled"])

    async def switch(self, *, enabled: bool) -> None:
        """Turn all background work on or off, on all replicas; it lasts over restarts."""
        await asyncio.to_thread(self._store.settings.set, SWITCH, {"enabled": enabled})
        self._supervisor.look()

    async def _jobs(self) -> list[Job]:
        return await asyncio.to_thread(lambda: self._store.jobs.list(limit=ALL))

    def _tested(self) -> dict[str, str]:
        """Digests of test sets, and a job that each was measured in."""
        rows = self._store.evaluations.list(limit=ALL, name="test")
        return {row["scores"]["data"]: str(row["job"]) for row in rows if row["scores"].get("data")}


def _open(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if not job.state.ended]


def _earlier(jobs: list[Job], key: str) -> tuple[Job, Any] | None:
    for job in jobs:
        if job.request.get("key") == key:
            return job, job.request["asked"]
    return None


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - LOG_BYTES))
        return file.read().decode("utf-8", "replace")
