"""Jobs as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from liveprune.pruning.errors import ConflictError, LiveprunError


class UnknownJobError(LiveprunError):
    """The request names a job that is not there."""


class LeaseLostError(ConflictError):
    """Another owner has the job, or it no longer runs."""


class JobState(StrEnum):
    """The life of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Job:
    """One job."""

    id: str
    request: Mapping[str, Any]
    state: JobState
    created: float
    started: float | None
    finished: float | None
    owner: str | None
    lease_until: float | None
    attempt: int
    cancel_asked: bool
    progress: Mapping[str, Any]
    best: Mapping[str, Any] | None
    cost: Mapping[str, Any]
    error: str
    result: Mapping[str, Any] | None


class Jobs(Protocol):
    """All jobs of one model."""

    def add(self, request: Mapping[str, Any]) -> Job: ...
    def get(self, id: str) -> Job: ...  # noqa: A002
    def list(self, *, limit: int = 100) -> list[Job]: ...
    def claim(self, owner: str, lease: float) -> Job | None: ...
    def beat(
        self,
        id: str,  # noqa: A002
        owner: str,
        lease: float,
        *,
        progress: Mapping[str, Any] | None = None,
        best: Mapping[str, Any] | None = None,
        cost: Mapping[str, Any] | None = None,
    ) -> Job: ...
    def finish(
        self,
        id: str,  # noqa: A002
        owner: str,
        state: JobState,
        *,
        error: str = "",
        result: Mapping[str, Any] | None = None,
    ) -> Job: ...
    def give_back(self, id: str, owner: str) -> Job: ...  # noqa: A002
    def ask_cancel(self, id: str) -> Job: ...  # noqa: A002
    def resume(self, id: str) -> Job: ...  # noqa: A002
