from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from liveprune.pruning.errors import ConflictError
from liveprune.server.store.database import open_database
from liveprune.server.store.jobs import Job, Jobs, JobState, LeaseLostError, UnknownJobError

LONG = 60.0
REQUEST = {"method": "reap", "experts": 0.5}


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    opened = open_database(url)
    yield opened
    opened.dispose()


@pytest.fixture
def jobs(engine: Engine) -> Jobs:
    return Jobs(engine, "m")


def claimed(jobs: Jobs, owner: str, lease: float = LONG) -> Job:
    job = jobs.claim(owner, lease)
    assert job is not None
    return job


def test_from_queue_to_end(jobs: Jobs) -> None:
    added = jobs.add(REQUEST)
    assert (added.state, added.request, added.attempt) == (JobState.QUEUED, REQUEST, 0)
    assert jobs.get(added.id) == added
    job = claimed(jobs, "a")
    assert (job.id, job.state, job.owner) == (added.id, JobState.RUNNING, "a")
    assert job.started is not None
    assert job.lease_until == pytest.approx(job.started + LONG, abs=1)
    assert jobs.claim("b", LONG) is None
    beaten = jobs.beat(job.id, "a", LONG, progress={"done": 1}, best={"dev": 0.5})
    again = jobs.beat(job.id, "a", LONG, cost={"cpu_seconds": 2.5})
    assert (beaten.progress, again.progress) == ({"done": 1}, {"done": 1})
    assert (again.best, again.cost) == ({"dev": 0.5}, {"cpu_seconds": 2.5})
    done = jobs.finish(job.id, "a", JobState.DONE, result={"digest": "d"})
    assert (done.state, done.result, done.owner) == (JobState.DONE, {"digest": "d"}, None)
    assert done.finished is not None
    assert jobs.claim("b", LONG) is None


def test_the_oldest_comes_first_and_the_newest_is_listed_first(jobs: Jobs) -> None:
    added = [jobs.add({"number": i}).id for i in range(5)]
    assert [job.id for job in jobs.list()] == added[::-1]
    assert [job.id for job in jobs.list(limit=2)] == added[:2:-1]
    assert [claimed(jobs, f"w{i}").id for i in range(5)] == added


def test_other_models_have_their_own(jobs: Jobs, engine: Engine) -> None:
    job = jobs.add(REQUEST)
    other = Jobs(engine, "other")
    assert (other.list(), other.claim("a", LONG)) == ([], None)
    with pytest.raises(UnknownJobError):
        other.get(job.id)


def test_a_lease_that_ran_out_is_anybodys(jobs: Jobs) -> None:
    jobs.add(REQUEST)
    first = claimed(jobs, "a", 0.05)
    time.sleep(0.1)
    second = claimed(jobs, "b")
    assert (second.id, second.attempt, second.started) == (first.id, 1, first.started)
    for late in (
        lambda: jobs.beat(first.id, "a", LONG, progress={"late": True}),
        lambda: jobs.finish(first.id, "a", JobState.DONE),
        lambda: jobs.give_back(first.id, "a"),
    ):
        with pytest.raises(LeaseLostError, match="owned by b; expected it running and owned by a"):
            late()
    assert jobs.get(first.id) == second


def test_an_owner_may_be_late_while_nobody_else_came(jobs: Jobs) -> None:
    jobs.add(REQUEST)
    job = claimed(jobs, "a", 0.01)
    time.sleep(0.05)
    jobs.beat(job.id, "a", LONG)
    assert jobs.claim("b", LONG) is None


def test_given_back_is_as_if_never_claimed(jobs: Jobs) -> None:
    added = jobs.add(REQUEST)
    job = claimed(jobs, "a")
    jobs.beat(job.id, "a", LONG, progress={"done": 3})
    back = jobs.give_back(job.id, "a")
    assert (back.state, back.owner, back.attempt) == (JobState.QUEUED, None, 0)
    assert back.progress == {"done": 3}
    assert claimed(jobs, "b").id == added.id


def test_cancelling(jobs: Jobs) -> None:
    waiting = jobs.add(REQUEST)
    assert jobs.ask_cancel(waiting.id).state is JobState.CANCELLED
    running = jobs.add(REQUEST)
    claimed(jobs, "a")
    asked = jobs.ask_cancel(running.id)
    assert (asked.state, asked.cancel_asked) == (JobState.RUNNING, True)
    assert jobs.beat(running.id, "a", LONG).cancel_asked
    jobs.finish(running.id, "a", JobState.CANCELLED)
    with pytest.raises(ConflictError, match="has ended: cancelled"):
        jobs.ask_cancel(running.id)


def test_resuming(jobs: Jobs) -> None:
    job = jobs.add(REQUEST)
    with pytest.raises(ConflictError, match="is queued, expected one that failed"):
        jobs.resume(job.id)
    claimed(jobs, "a")
    jobs.ask_cancel(job.id)
    jobs.finish(job.id, "a", JobState.FAILED, error="no luck")
    again = jobs.resume(job.id)
    assert (again.state, again.error, again.finished) == (JobState.QUEUED, "", None)
    assert not again.cancel_asked
    jobs.finish(claimed(jobs, "b").id, "b", JobState.DONE)
    with pytest.raises(ConflictError, match="is done, expected"):
        jobs.resume(job.id)


def test_ids_may_be_cut_short(jobs: Jobs) -> None:
    job = jobs.add(REQUEST)
    assert jobs.get(job.id[:8]) == job
    for bad in (job.id[:3], "0123", "%", "____", "", job.id + "0"):
        with pytest.raises(UnknownJobError, match="no such job"):
            jobs.get(bad)


def test_a_job_does_not_end_in_running(jobs: Jobs) -> None:
    job = jobs.add(REQUEST)
    claimed(jobs, "a")
    with pytest.raises(ValueError, match="expected one that a job ends in"):
        jobs.finish(job.id, "a", JobState.RUNNING)


def _take_all(url: str, owner: str, taken: multiprocessing.Queue[list[str]]) -> None:
    engine = open_database(url)
    jobs, mine = Jobs(engine, "m"), []
    while (job := jobs.claim(owner, LONG)) is not None:
        mine.append(job.id)
        jobs.finish(job.id, owner, JobState.DONE)
    engine.dispose()
    taken.put(mine)


def test_each_job_is_taken_once(jobs: Jobs, url: str) -> None:
    added = [jobs.add({"number": i}).id for i in range(40)]
    context = multiprocessing.get_context("spawn")
    taken: multiprocessing.Queue[list[str]] = context.Queue()
    workers = [context.Process(target=_take_all, args=(url, f"w{i}", taken)) for i in range(3)]
    for worker in workers:
        worker.start()
    counts = Counter(job for _ in workers for job in taken.get(timeout=120))
    for worker in workers:
        worker.join()
    assert counts == Counter(added)
    assert {job.state for job in jobs.list()} == {JobState.DONE}


def _work(url: str, owner: str, statements: int) -> None:
    """Do jobs; dies before the statement of that number, mostly inside a transaction."""
    engine = open_database(url)
    left = [statements]

    def count(*_: object) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(engine, "before_cursor_execute", count)
    jobs = Jobs(engine, "m")
    while (job := jobs.claim(owner, 0.2)) is not None:
        done = int(job.progress.get("done", 0))
        for step in range(done + 1, 6):
            jobs.beat(job.id, owner, 0.2, progress={"done": step})
        jobs.finish(job.id, owner, JobState.DONE, result={"steps": 5})


def test_killed_at_random_points_every_job_ends_once(jobs: Jobs, url: str) -> None:
    """Workers die all the time; the queue stays readable and others go on."""
    added = {jobs.add({"number": i}).id for i in range(6)}
    context, draw = multiprocessing.get_context("fork"), random.Random(0)
    ends = []
    while any(not job.state.ended for job in jobs.list()):
        worker = context.Process(target=_work, args=(url, f"w{len(ends)}", draw.randrange(1, 60)))
        worker.start()
        worker.join()
        ends.append(worker.exitcode)
    found = jobs.list()
    assert {job.id for job in found} == added
    assert {(job.state, job.progress["done"]) for job in found} == {(JobState.DONE, 5)}
    assert ends.count(-signal.SIGKILL) >= 3
    assert set(ends) <= {-signal.SIGKILL, 0}
