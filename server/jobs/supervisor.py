"""Has jobs done in the server: claims one at a time, starts its worker, watches it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import sys
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from liveprune.pruning.errors import LiveprunError
from liveprune.server.admin_key import KEY_VARIABLE, key_digest
from liveprune.server.jobs.assignment import Assignment, job_folder
from liveprune.server.jobs.attempts import STALLS, begun, hopeless, settled
from liveprune.server.jobs.request import StoredRequest
from liveprune.server.jobs.worker import GRACE
from liveprune.server.store.jobs import Job, JobState, LeaseLostError
from liveprune.server.store.store import Store

LEASE = 15.0
"""Seconds after which a job whose worker is silent is anybody's."""
POLL = 1.0
BACKOFF = (1.0, 60.0)
"""Seconds before a job is tried again after its worker died, doubled each time up to the second."""
SWITCH = "background"
"""Key of the switch in the store's settings: ``{"enabled": bool}``."""
LOG_FILE = "log"
SECRETS = (KEY_VARIABLE, "VLLM_API_KEY")
"""Environment variables that no worker needs."""

logger = logging.getLogger("liveprune.jobs")


class Engine(Protocol):
    """The serving engine, as far as background work goes."""

    async def allow(self, share: float) -> None:
        """Let candidates have so much of its time, at most."""

    async def forbid(self, reason: str) -> None:
        """Let no candidate in, and interrupt those that are."""

    async def interrupt(self) -> None:
        """Interrupt candidates whose worker is gone."""


@dataclass
class _Running:
    """A worker and its job."""

    job: Job
    owner: str
    key: str
    process: asyncio.subprocess.Process


Spawn = Callable[[Assignment, Path], Awaitable[asyncio.subprocess.Process]]


class Supervisor:
    """Runs in the server's event loop, from ``start`` to ``stop``."""

    def __init__(
        self,
        store: Store,
        base: Path,
        admin_url: str,
        engine: Engine,
        *,
        lease: float = LEASE,
        poll: float = POLL,
        prompts: Path,
        calibrated: Path | None = None,
        spawn: Spawn | None = None,
    ) -> None:
        """Args:
        store: of the model.
        base: checkpoint folder of the base model.
        admin_url: where a worker of this machine reaches the admin API.
        engine: the serving one.
        lease: seconds.
        poll: seconds between two looks at store and worker.
        prompts: folder of the kept prompts.
        calibrated: folder for the statistics that plans were made from.
        spawn: starts a worker's process with its log file; None: a real one.
        """
        self._store, self._base, self._admin_url = store, base, admin_url
        self._engine = engine
        self._lease, self._poll = lease, poll
        self._prompts = str(prompts.resolve())
        self._calibrated = None if calibrated is None else str(calibrated.resolve())
        self._spawn = spawn or spawn_worker
        self._running: _Running | None = None
        self._crashes = 0
        """Workers in a row that died."""
        self._not_before = 0.0
        self._enabled: bool | None = None
        self._stopping = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for jobs."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop the worker; its job waits for the next start."""
        self._stopping = True
        self.look()
        if self._task is not None:
            await self._task
        await self._end_worker("the server stops")

    def look(self) -> None:
        """Look at once: something has changed."""
        self._wake.set()

    @property
    def keys(self) -> tuple[bytes, ...]:
        """Digests of the admin keys that workers have now."""
        return () if self._running is None else (key_digest(self._running.key),)

    @property
    def running(self) -> str | None:
        """Id of the job that is worked on here."""
        return None if self._running is None else self._running.job.id

    async def _run(self) -> None:
        while not self._stopping:
            try:
                await self._look()
            except (LiveprunError, OSError) as error:  # a database that is away may come back
                logger.warning("jobs: %s", error)
            except Exception:  # a defect in one look must not end all background work
                logger.exception("jobs: unexpected")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll):
                    await self._wake.wait()
            self._wake.clear()

    async def _look(self) -> None:
        setting = await asyncio.to_thread(self._store.settings.get, SWITCH, {"enabled": True})
        enabled = bool(setting["enabled"])
        if enabled != self._enabled:
            logger.info("background work is %s", "on" if enabled else "off")
            self._enabled = enabled
        if not enabled:
            await self._engine.forbid("background work is switched off")
            await self._end_worker("background work is switched off")
            return
        running = self._running
        if running is None:
            await self._engine.allow(1.0)
            if asyncio.get_running_loop().time() >= self._not_before:
                await self._begin()
        elif running.process.returncode is not None:
            await self._ended(running)
            self._wake.set()  # the next one need not wait

    async def _begin(self) -> None:
        """Claim a job, if one waits, and start its worker."""
        owner = f"{self._store.replica}/{uuid.uuid4().hex[:12]}"
        jobs = self._store.jobs
        job = await asyncio.to_thread(jobs.claim, owner, self._lease)
        if job is None:
            return
        try:
            stored = StoredRequest.model_validate(job.request)
            cost = begun(job.cost)
            if hopeless(cost):
                await asyncio.to_thread(self._give_up, job, owner)
                return
            await asyncio.to_thread(jobs.beat, job.id, owner, self._lease, cost=cost)
            await self._engine.allow(stored.request.share)
            key = secrets.token_urlsafe(32)
            process = await self._start(job, owner, key)
        except ValueError as error:  # of another release
            text = f"its request is not readable: {error}"
            await asyncio.to_thread(jobs.finish, job.id, owner, JobState.FAILED, error=text)
            return
        except OSError:  # no process, or no disk: later, maybe
            await asyncio.to_thread(jobs.give_back, job.id, owner)
            self._delay()
            raise
        logger.info("job %s: worker %d, attempt %d", job.id, process.pid, job.attempt + 1)
        self._running = _Running(job, owner, key, process)

    async def _start(self, job: Job, owner: str, key: str) -> asyncio.subprocess.Process:
        store = self._store
        assignment = Assignment(
            job=job.id,
            owner=owner,
            lease=self._lease,
            store=store.url,
            files=str(store.files.resolve()),
            model=store.model,
            replica=store.replica,
            base=str(self._base.resolve()),
            admin_url=self._admin_url,
            admin_key=key,
            prompts=self._prompts,
            calibrated=self._calibrated,
        )
        folder = job_folder(store.files, job.id)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return await self._spawn(assignment, folder / LOG_FILE)

    def _give_up(self, job: Job, owner: str) -> None:
        jobs = self._store.jobs
        jobs.beat(job.id, owner, self._lease, cost=settled(job.cost))  # for a resume
        error = f"given up: {STALLS} workers in a row died without a new evaluation; see its log"
        jobs.finish(job.id, owner, JobState.FAILED, error=error)

    async def _ended(self, running: _Running) -> None:
        """The worker's process is over; whatever it left undone goes on with another one."""
        self._running = None
        await self._engine.interrupt()
        job = await asyncio.to_thread(self._store.jobs.get, running.job.id)
        if job.state is JobState.RUNNING and job.owner == running.owner:
            status = running.process.returncode
            logger.warning("job %s: its worker ended with status %s", job.id, status)
            self._delay()
            await asyncio.to_thread(self._store.jobs.give_back, job.id, running.owner)
        elif job.state is JobState.QUEUED:  # given back because the engine failed it
            self._delay()
        else:
            logger.info("job %s: %s %s", job.id, job.state, job.error)
            self._crashes = 0
            await asyncio.to_thread(self._store.drop_old_jobs)

    def _delay(self) -> None:
        first, longest = BACKOFF
        wait = min(first * 2**self._crashes, longest)
        self._crashes += 1
        self._not_before = asyncio.get_running_loop().time() + wait

    async def _end_worker(self, reason: str) -> None:
        running = self._running
        if running is None:
            return
        logger.info("job %s: stopped: %s", running.job.id, reason)
        process = running.process
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(GRACE + 5):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self._running = None
        with contextlib.suppress(LeaseLostError):  # it gave the job back itself, or ended it
            await asyncio.to_thread(self._give_back, running)

    def _give_back(self, running: _Running) -> None:
        """After an end in order, which is no failed attempt."""
        jobs, job = self._store.jobs, running.job
        cost = settled(jobs.get(job.id).cost)
        jobs.beat(job.id, running.owner, self._lease, cost=cost)
        jobs.give_back(job.id, running.owner)


async def spawn_worker(assignment: Assignment, log: Path) -> asyncio.subprocess.Process:
    """Start a worker, told what to do by its standard input, which ends with this process."""
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if k not in SECRETS}
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "liveprune.server.jobs.worker",
            assignment.job,  # for people who list processes
            stdin=asyncio.subprocess.PIPE,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,  # Ctrl-C is the server's; it stops the worker in order
        )
    if process.stdin is None:
        raise ValueError("a worker without a standard input")
    process.stdin.write(assignment.line())
    await process.stdin.drain()
    return process
