"""Routes of the admin API about background jobs, and the switch of all background work."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response

from liveprune.pruning.errors import IncompatibleEnvironmentError
from liveprune.server.admin_changes import Admin
from liveprune.server.admin_models import Body
from liveprune.server.jobs.request import JobRequest, StoredRequest
from liveprune.server.jobs.service import JobService
from liveprune.server.store.jobs import Job, JobState

router = APIRouter()


class JobBody(Body):
    """One job."""

    id: str
    state: JobState
    request: JobRequest
    created: float
    """Seconds since 1970."""
    started: float | None
    finished: float | None
    attempt: int
    """Times that it went on after a crash of server or worker."""
    cancel_asked: bool
    progress: dict[str, Any]
    """`stage`, `done` of `total`, `ratio`, `seconds_left`."""
    best: dict[str, Any] | None
    """`fitness` of the best candidate so far, and the `stage` that found it."""
    cost: dict[str, Any]
    """`cpu_seconds`, `engine_seconds`, `tokens`, `evaluations`."""
    error: str | None
    """Why it failed."""
    result: dict[str, Any] | None
    """`digest`, `tag`, `experts` of `of`, `measure`, `scores`, `live`."""

    @classmethod
    def of(cls, job: Job) -> JobBody:
        return cls(
            id=job.id,
            state=job.state,
            request=StoredRequest.model_validate(job.request).request,
            created=job.created,
            started=job.started,
            finished=job.finished,
            attempt=job.attempt,
            cancel_asked=job.cancel_asked,
            progress=dict(job.progress),
            best=None if job.best is None else dict(job.best),
            cost={name: job.cost[name] for name in COSTS if name in job.cost},
            error=job.error or None,
            result=None if job.result is None else dict(job.result),
        )


COSTS = ("cpu_seconds", "engine_seconds", "tokens", "evaluations")


class JobList(Body):
    """The newest first."""

    jobs: list[JobBody]


class JobLog(Body):
    """The end of a job's log."""

    log: str


class Background(Body):
    """The switch of all background work."""

    enabled: bool


def _admin(request: Request) -> Admin:
    admin: Admin = request.app.state.admin
    return admin


def _jobs(request: Request) -> JobService:
    jobs = _admin(request).jobs
    if jobs is None:
        raise IncompatibleEnvironmentError("this server has no store, expected one for jobs")
    return jobs


AdminDependency = Annotated[Admin, Depends(_admin)]
Jobs = Annotated[JobService, Depends(_jobs)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="A repeated request with the same key gets the first one's job.",
    ),
]


@router.post("/jobs", status_code=202)
async def start_job(
    body: JobRequest,
    admin: AdminDependency,
    jobs: Jobs,
    request: Request,
    response: Response,
    key: IdempotencyKey = None,
) -> JobBody:
    """Queue a background pruning run; what can be known to fail is refused now."""
    parameters = {**body.model_dump(mode="json", exclude_defaults=True), "idempotency_key": key}
    found = await admin.recorded(
        request,
        parameters,
        lambda: jobs.start(body, key=key, who=request.state.who),
        lambda job: job.id,
    )
    response.headers["Location"] = f"/admin/v1/jobs/{found.id}"
    return JobBody.of(found)


@router.get("/jobs")
async def list_jobs(jobs: Jobs) -> JobList:
    """Jobs, the newest first."""
    return JobList(jobs=[JobBody.of(job) for job in await jobs.newest()])


@router.get("/jobs/{job_id}")
async def get_job(job_id: str, jobs: Jobs) -> JobBody:
    """One job, by its id or the beginning of it."""
    return JobBody.of(await jobs.get(job_id))


@router.get("/jobs/{job_id}/logs")
async def get_job_log(job_id: str, jobs: Jobs) -> JobLog:
    """The end of a job's log."""
    return JobLog(log=await jobs.log(job_id))


@router.post("/jobs/{job_id}/cancel", status_code=202)
async def cancel_job(job_id: str, admin: AdminDependency, jobs: Jobs, request: Request) -> JobBody:
    """Stop a job at its next safe point; it can be resumed."""
    parameters = {"job": job_id}
    found = await admin.recorded(
        request, parameters, lambda: jobs.cancel(job_id), lambda job: job.id
    )
    return JobBody.of(found)


@router.post("/jobs/{job_id}/resume", status_code=202)
async def resume_job(job_id: str, admin: AdminDependency, jobs: Jobs, request: Request) -> JobBody:
    """Queue a job again that failed or was cancelled; it goes on where it stopped."""
    parameters = {"job": job_id}
    found = await admin.recorded(
        request, parameters, lambda: jobs.resume(job_id), lambda job: job.id
    )
    return JobBody.of(found)


@router.get("/background")
async def get_background(jobs: Jobs) -> Background:
    """Whether background work is on."""
    return Background(enabled=await jobs.enabled())


@router.post("/background", status_code=202)
async def switch_background(
    body: Background, admin: AdminDependency, jobs: Jobs, request: Request
) -> Background:
    """Turn all background work on or off; jobs go on where they stopped."""
    await admin.recorded(
        request,
        body.model_dump(),
        lambda: jobs.switch(enabled=body.enabled),
        lambda _: "background",
    )
    return body
