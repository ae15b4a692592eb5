"""The admin API's stream of events, which the dashboard page lives on."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from liveprune.server.admin_changes import Admin
from liveprune.server.admin_jobs import JobBody, JobList
from liveprune.server.admin_models import StatusBody
from liveprune.server.event_feed import EventFeed, Source
from liveprune.server.experiment_models import ExperimentList

router = APIRouter()


def event_sources(admin: Admin) -> dict[str, Source]:
    """The events that there are; what a server does not have at all is an empty list."""

    async def status() -> StatusBody:
        return StatusBody.of(await admin.control.status())

    async def experiments() -> ExperimentList:
        found = [] if admin.experiments is None else await admin.experiments.newest()
        return ExperimentList(experiments=found)

    async def jobs() -> JobList:
        found = () if admin.jobs is None else await admin.jobs.newest()
        return JobList(jobs=[JobBody.of(job) for job in found])

    return {"status": status, "experiments": experiments, "jobs": jobs}


class EventStream(StreamingResponse):
    """One listener, from its first byte until it goes or is told to."""

    def __init__(self, feed: EventFeed, request: Request) -> None:
        # A key that is taken away takes its streams with it.
        super().__init__(
            feed.events(request.state.still_admitted),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._feed.listening():
            await super().__call__(scope, receive, send)


# Not in the OpenAPI document, whose clients expect that an answer ends.
@router.get("/events", response_class=EventStream, include_in_schema=False)
async def listen(request: Request) -> EventStream:
    """Events ``status``, ``experiments`` and ``jobs``, each when its content has changed."""
    feed: EventFeed = request.app.state.events
    feed.check_room()
    return EventStream(feed, request)
