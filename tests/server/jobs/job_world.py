"""A store with jobs, and a supervisor over real workers, for the shipped demo model."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.demo import model_path, rows_path
from liveprune.server.jobs.request import JobRequest, StoredRequest
from liveprune.server.jobs.row_files import digest_of
from liveprune.server.jobs.supervisor import Supervisor
from liveprune.server.store.jobs import Job, JobState
from liveprune.server.store.store import Store

TRAIN = rows_path("sort", "train").resolve()
DEV = rows_path("sort", "dev").resolve()
TEST = rows_path("sort", "test").resolve()
EEP = {"merge": False, "prune_candidates": 16, "inits": 8, "groups": 1, "dev_num": 4}


def stored(**changes: Any) -> StoredRequest:
    """A small job on an engine of its own."""
    fields: dict[str, Any] = {
        "method": "random",
        "source": {"data": str(TRAIN)},
        "dev": str(DEV),
        "experts": "4",
        "tag": "a",
        "engine": "transformers",
        "max_rows": 12,
        **changes,
    }
    request = JobRequest.model_validate(fields)
    named = {"data": request.source.data, "dev": request.dev, "test": request.test}
    digests = {name: digest_of(Path(path)) for name, path in named.items() if path is not None}
    return StoredRequest(request=request, digests=digests)


class FakeBackground:
    """The serving engine as the supervisor sees it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def allow(self, share: float) -> None:
        self._note(share)

    async def forbid(self, reason: str) -> None:
        self._note(reason)

    async def interrupt(self) -> None:
        self._note("interrupt")

    def _note(self, call: Any) -> None:
        if self.calls[-1:] != [call]:
            self.calls.append(call)


class JobWorld:
    """One server's background work."""

    def __init__(
        self, folder: Path, *, url: str | None = None, replica: str = "here", **options: Any
    ) -> None:
        model = fingerprint_model(model_path())
        self.store = Store(folder, model, url=url, replica=replica)
        self.engine = FakeBackground()
        self.supervisor = Supervisor(
            self.store,
            model_path(),
            "http://127.0.0.1:1",
            self.engine,
            **{"lease": 3.0, "poll": 0.05, "prompts": folder / "prompts", **options},
        )

    def add(self, **changes: Any) -> str:
        return self.store.jobs.add(stored(**changes).model_dump(mode="json")).id

    def job(self, job_id: str) -> Job:
        return self.store.jobs.get(job_id)

    async def until(self, job_id: str, holds: Callable[[Job], bool], seconds: float = 240) -> Job:
        deadline = time.monotonic() + seconds
        while not holds(job := self.job(job_id)):
            assert time.monotonic() < deadline, f"{job}\n{self.log(job_id)}"
            await asyncio.sleep(0.05)
        return job

    async def evaluated(self, job_id: str, least: int = 0) -> Job:
        return await self.until(job_id, lambda job: job.cost.get("evaluations", 0) > least)

    async def ended(self, job_id: str) -> Job:
        return await self.until(job_id, lambda job: job.state.ended)

    def log(self, job_id: str) -> str:
        path = self.store.files / "jobs" / job_id / "log"
        return path.read_text() if path.exists() else ""

    @property
    def worker(self) -> int | None:
        """Process id of the worker."""
        running = self.supervisor._running
        return None if running is None else running.process.pid

    def kill(self) -> None:
        assert self.worker is not None
        os.kill(self.worker, signal.SIGKILL)


def done(job: Job) -> Job:
    assert job.state is JobState.DONE, job
    return job
