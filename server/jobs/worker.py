"""The process that does one job: ``python -m liveprune.server.jobs.worker``, told by its input.

It ends with the server that started it, and can be killed at any moment: whoever claims the job
next goes on from its folder.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from liveprune.pruning.errors import EngineError, LiveprunError
from liveprune.pruning.search.evaluator import SearchCancelledError
from liveprune.server.admin_client import AdminClient
from liveprune.server.jobs.assignment import Assignment
from liveprune.server.jobs.attempts import settled
from liveprune.server.jobs.heart import Heart
from liveprune.server.jobs.metered_engine import Meter
from liveprune.server.jobs.publish import publish
from liveprune.server.jobs.request import StoredRequest
from liveprune.server.jobs.run import Work
from liveprune.server.jobs.tracker import Tracker
from liveprune.server.store.jobs import Job, JobState, LeaseLostError
from liveprune.server.store.store import Store
from liveprune.server.variant import FULL

NICENESS = 19
GRACE = 10.0
"""Seconds that the work has to come to a safe point once it is told to stop."""
LOST, ALONE = 3, 4
"""Exit statuses: the job is another's; the server is gone."""

logger = logging.getLogger("liveprune.jobs")


def main() -> None:
    """Do one job and exit; its outcome is in the store."""
    assignment = Assignment.parse(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_server, daemon=True).start()
    os.nice(NICENESS)  # on a CPU, users' tokens come first
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a call says nothing
    assignment.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    store = Store(
        assignment.files_path, assignment.model, url=assignment.store, replica=assignment.replica
    )
    try:
        Worker(store, assignment).run()
    finally:
        store.close()


class Worker:
    """One job from claim to outcome."""

    def __init__(self, store: Store, assignment: Assignment) -> None:
        self._store, self._assignment = store, assignment
        self._heart = Heart(
            store.jobs,
            assignment.job,
            assignment.owner,
            assignment.lease,
            on_lost=lambda: os._exit(LOST),
        )
        self._job: Job = store.jobs.get(assignment.job)

    def run(self) -> None:
        """Work, and tell the store how it ended."""
        signal.signal(signal.SIGTERM, self._stop)
        threading.Thread(target=self._insist, daemon=True).start()
        job = self._job
        logger.info("job %s begins, attempt %d", job.id, job.attempt + 1)
        try:
            with self._heart:
                result = self._work()
        except SearchCancelledError:
            self._stopped()
        except LeaseLostError as error:
            logger.error("%s", error)  # noqa: TRY400 - no traceback: nothing is wrong here
            sys.exit(LOST)
        except (LiveprunError, OSError) as error:
            if isinstance(error, EngineError) and self._engine_is_gone():
                logger.warning("the server is going: %s", error)
                self._store.jobs.give_back(job.id, self._assignment.owner)
                return
            self._failed(str(error))
        except Exception as error:
            # A defect; whatever it is, the job ends and says so.
            logger.exception("unexpected")
            self._failed(f"unexpected {type(error).__name__}: {error}; its log has more")
        else:
            logger.info("done: %s", result)
            self._store.jobs.finish(job.id, self._assignment.owner, JobState.DONE, result=result)

    def _work(self) -> dict[str, Any]:
        job, assignment = self._job, self._assignment
        stored = StoredRequest.model_validate(job.request)
        meter = Meter(job.cost, lambda cost: self._heart.tell(cost=cost))
        with self._client() as client:
            work = Work(
                stored, assignment, self._heart, meter, lambda: client.statistics_file(FULL)
            )
            outcome = work.run()
            check = Tracker(self._heart).check
            calibrated = None if assignment.calibrated is None else Path(assignment.calibrated)
            found = publish(self._store, client, job, stored, outcome, check, calibrated)
        self._heart.tell(cost=meter.cost)
        return found

    def _client(self) -> AdminClient:
        assignment = self._assignment
        return AdminClient(assignment.admin_url, assignment.admin_key, key_source="the server")

    def _engine_is_gone(self) -> bool:
        """Then the job goes on when the server is back, whatever an evaluation ended with."""
        try:
            with self._client() as client:
                return not client.status()["ready"]
        except EngineError:
            return True

    def _failed(self, error: str) -> None:
        logger.error("failed: %s", error)
        self._store.jobs.finish(self._job.id, self._assignment.owner, JobState.FAILED, error=error)

    def _stopped(self) -> None:
        jobs, job, owner = self._store.jobs, self._job, self._assignment.owner
        if self._heart.cancel_asked:
            logger.info("cancelled")
            jobs.finish(job.id, owner, JobState.CANCELLED)
        else:
            logger.info("stopped; it goes on later")
            cost = settled(jobs.get(job.id).cost)
            jobs.beat(job.id, owner, self._assignment.lease, cost=cost)
            jobs.give_back(job.id, owner)

    def _stop(self, _: int, __: FrameType | None) -> None:
        self._heart.cancelled.set()

    def _insist(self) -> None:
        """Work that does not come to a safe point in time is left where it is: it is resumable."""
        self._heart.cancelled.wait()
        threading.Event().wait(GRACE)
        try:
            self._stopped()
        finally:
            os._exit(0)


def _end_with_server() -> None:
    """The server holds the other end of the pipe; nothing more is ever sent."""
    sys.stdin.buffer.read()
    os._exit(ALONE)


if __name__ == "__main__":
    main()
