"""Jobs from claim to variant, with real worker processes on the demo model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from liveprune.pruning.calibration.statistics import RoutingStatistics
from liveprune.pruning.demo import model_path
from liveprune.pruning.evaluation.task import load_task
from liveprune.pruning.evaluation.transformers_engine import TransformersEngine
from liveprune.pruning.prune import make_plan
from liveprune.server.jobs.assignment import Assignment
from liveprune.server.jobs.attempts import STALLS
from liveprune.server.jobs.supervisor import SWITCH
from liveprune.server.store.jobs import JobState
from tests.server.jobs.job_world import DEV, EEP, TEST, TRAIN, JobWorld, done

pytestmark = pytest.mark.timeout(600)

Test = Callable[[JobWorld], Awaitable[None]]


def run(folder: Path, test: Test, **options: Any) -> JobWorld:
    """Run a test beside a supervisor; no worker outlives it."""

    async def bounded() -> JobWorld:
        world = JobWorld(folder, **options)
        world.supervisor.start()
        try:
            async with asyncio.timeout(500):
                await test(world)
        finally:
            await world.supervisor.stop()
            assert world.worker is None
            world.store.close()
        return world

    return asyncio.run(bounded())


def test_a_one_pass_job_becomes_a_variant_with_lineage_and_scores(tmp_path: Path) -> None:
    async def test(world: JobWorld) -> None:
        job = done(await world.ended(world.add(method="reap", test=str(TEST), seed=3, share=0.25)))
        plan = make_plan(model_path(), method="reap", experts="4", calibration=TRAIN, max_rows=12)
        assert job.result is not None
        assert job.result["digest"] == plan.digest
        assert (job.result["experts"], job.result["of"]) == (16, 32)
        assert not job.result["live"]
        engine = TransformersEngine(model_path(), dtype="float32")
        for name, path in (("dev", DEV), ("test", TEST)):
            task = load_task(path, model_path(), measure="exact", max_rows=12)
            full, ours = task.values(engine, [None, plan]).mean(1)
            scores = job.result["scores"][name]
            assert (scores["full"]["mean"], scores["plan"]["mean"]) == (full, ours)
            assert scores["difference"]["difference"] == pytest.approx(ours - full)
            assert scores["plan"]["low"] <= ours <= scores["plan"]["high"]
            rows = {x["digest"]: x["scores"] for x in world.store.evaluations.list(name=name)}
            assert rows[plan.digest]["mean"] == ours
            assert rows[None]["mean"] == full
        variant = world.store.variants.all()["a"]
        assert (variant.digest, variant.job) == (plan.digest, job.id)
        lineage = variant.lineage
        assert lineage["method"] == "reap"
        assert lineage["parameters"]["experts"] == "4"
        assert lineage["calibration"] == plan.lineage.calibration
        assert set(lineage["files"]) == {"data", "dev", "test"}
        assert set(lineage["versions"]) >= {"liveprune", "torch"}
        assert lineage["scores"]["dev"]["plan"]["n"] == 12
        assert world.store.plans.load(plan.digest) == plan
        assert job.cost["evaluations"] == 4
        assert job.cost["tokens"] > 0
        assert job.cost["cpu_seconds"] > 0
        assert 0.25 in world.engine.calls
        kept = RoutingStatistics.load(tmp_path / "calibrated" / f"{plan.digest}.safetensors")
        assert kept.calibration == plan.lineage.calibration
        assert "key" not in world.log(job.id)

    run(tmp_path, test, calibrated=tmp_path / "calibrated")


def test_a_killed_worker_goes_on_to_the_same_plan(tmp_path: Path) -> None:
    asked = {"method": "eep", "settings": EEP, "seed": 5}
    results = []

    async def unbroken(world: JobWorld) -> None:
        job = done(await world.ended(world.add(**asked)))
        assert job.result is not None
        results.append(job.result)
        assert job.best is not None
        assert job.progress["stage"] == "done"

    async def broken(world: JobWorld) -> None:
        job_id = world.add(**asked)
        for least in (0, 16):
            await world.evaluated(job_id, least)
            world.kill()
            job = await world.until(job_id, lambda job: job.state is not JobState.RUNNING)
            assert job.state is JobState.QUEUED, "it was killed in the middle"
        job = done(await world.ended(job_id))
        results.append(job.result)

    run(tmp_path / "unbroken", unbroken)
    run(tmp_path / "broken", broken)
    assert results[0] == results[1]


def test_cancel_and_resume(tmp_path: Path) -> None:
    async def test(world: JobWorld) -> None:
        job_id = world.add(method="eep", settings=EEP)
        waiting = world.add(tag="b")
        await world.evaluated(job_id)
        assert world.store.jobs.ask_cancel(waiting).state is JobState.CANCELLED
        world.store.jobs.ask_cancel(job_id)
        assert (await world.ended(job_id)).state is JobState.CANCELLED
        world.store.jobs.resume(job_id)
        done(await world.ended(job_id))
        assert world.job(waiting).state is JobState.CANCELLED
        assert set(world.store.variants.all()) == {"a"}

    run(tmp_path, test)


def test_the_switch_stops_the_worker_and_the_job_goes_on_after_it(tmp_path: Path) -> None:
    async def test(world: JobWorld) -> None:
        job_id = world.add(method="eep", settings=EEP)
        await world.evaluated(job_id)
        world.store.settings.set(SWITCH, {"enabled": False})
        job = await world.until(job_id, lambda job: job.state is not JobState.RUNNING)
        if not job.state.ended:
            assert job.state is JobState.QUEUED
            assert job.attempt == 0
        await world.until(job_id, lambda _: world.worker is None)
        assert "background work is switched off" in world.engine.calls
        world.store.settings.set(SWITCH, {"enabled": True})
        done(await world.ended(job_id))

    run(tmp_path, test)


def test_a_server_that_stops_leaves_its_job_to_the_next(tmp_path: Path) -> None:
    ids = []

    async def first(world: JobWorld) -> None:
        ids.append(world.add(method="eep", settings=EEP))
        await world.evaluated(ids[0])

    async def second(world: JobWorld) -> None:
        done(await world.ended(ids[0]))

    run(tmp_path, first)
    run(tmp_path, second)


def test_a_worker_ends_with_its_server(tmp_path: Path) -> None:
    async def test(world: JobWorld) -> None:
        job_id = world.add(method="eep", settings={**EEP, "prune_candidates": 400})
        await world.until(job_id, lambda job: job.state is JobState.RUNNING)
        await world.until(job_id, lambda _: world.worker is not None)
        assert world.worker is not None
        process = psutil.Process(world.worker)
        running = world.supervisor._running
        assert running is not None
        assert running.process.stdin is not None
        command = " ".join(process.cmdline())
        assert job_id in command
        assert running.key not in command + str(process.environ())
        running.process.stdin.close()  # as the kernel does when the server is killed
        assert await running.process.wait() == 4

    run(tmp_path, test)


def test_what_cannot_be_done_fails_and_says_why(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(TRAIN.read_text())

    async def test(world: JobWorld) -> None:
        changed = world.add(source={"data": str(rows)})
        with rows.open("a") as file:
            file.write('{"prompt": "a", "answer": "b"}\n')
        job = await world.ended(changed)
        assert job.state is JobState.FAILED
        assert "expected" in job.error
        assert str(rows) in job.error
        assert job.error in world.log(changed)
        taken = world.add(tag="taken")
        world.store.variants.publish("taken", "0" * 32, 1, {}, job=None)
        job = await world.ended(taken)
        assert job.state is JobState.FAILED
        assert "'taken'" in job.error

    run(tmp_path / "world", test)


def test_a_job_whose_workers_die_at_once_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liveprune.server.jobs.supervisor.BACKOFF", (0.01, 0.02))

    spawned: list[str] = []

    async def dies(assignment: Assignment, _: Any) -> asyncio.subprocess.Process:
        spawned.append(assignment.job)
        return await asyncio.create_subprocess_exec("false", stdin=asyncio.subprocess.PIPE)

    async def test(world: JobWorld) -> None:
        job_id = world.add()
        job = await world.ended(job_id)
        assert job.state is JobState.FAILED
        assert f"{STALLS} workers in a row died" in job.error
        assert spawned == [job_id] * STALLS
        world.store.jobs.resume(job_id)
        assert (await world.ended(job_id)).state is JobState.FAILED
        assert len(spawned) == 2 * STALLS, "as often again"

    run(tmp_path, test, spawn=dies)


def test_a_job_keeps_to_its_budget_options(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"experts": 0.5, "allocate": "global", "min_experts": 3}
    asked |= {"max_experts": 6, "skip_layers": [0], "snap": "3", "keep_super_experts": True}

    async def test(world: JobWorld) -> None:
        fields = {**asked, "experts": "0.5"}
        job = done(await world.ended(world.add(method="reap", **fields)))
        assert job.result is not None
        plan = world.store.plans.load(job.result["digest"])
        kept = [layer.kept_experts for layer in plan.layers]
        assert kept[0] == 8
        assert set(kept[1:]) <= {3, 6}
        assert plan.lineage.parameters["allowed_counts"] == [3, 6]
        assert plan.lineage.parameters["keep_super_experts"]

    run(tmp_path, test)


def test_a_search_for_budgets_that_is_killed_goes_on_to_the_same_plan(tmp_path: Path) -> None:
    settings = {"population": 6, "elites": 2, "generations": 2}
    asked = {"method": "reap", "allocate": "evoesap", "settings": settings, "seed": 2}
    results = []

    async def unbroken(world: JobWorld) -> None:
        job = done(await world.ended(world.add(**asked)))
        assert job.result is not None
        plan = world.store.plans.load(job.result["digest"])
        assert sum(layer.kept_experts for layer in plan.layers) == 16
        assert plan.lineage.parameters["allocate"] == "evoesap"
        assert plan.lineage.scores["allocation"]["name"] == "evoesap"
        assert job.best is not None
        results.append(job.result)

    async def broken(world: JobWorld) -> None:
        job_id = world.add(**asked)
        await world.evaluated(job_id, 3)
        world.kill()
        results.append(done(await world.ended(job_id)).result)

    run(tmp_path / "unbroken", unbroken)
    run(tmp_path / "broken", broken)
    assert results[0] == results[1]


def test_a_job_learns_from_kept_prompts_as_they_were_when_it_began(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for number, line in enumerate(TRAIN.read_text().splitlines()[:10]):
        (prompts / f"{number:03d}-a.jsonl").write_text(line + "\n")
    lines = [json.loads(path.read_text()) for path in sorted(prompts.iterdir())]
    asked: dict[str, Any] = {"source": {"prompts": "kept"}, "dev": None}
    asked |= {"method": "eep", "settings": {**EEP, "dev_num": 2}, "max_rows": 10}

    async def test(world: JobWorld) -> None:
        job_id = world.add(**asked)
        await world.evaluated(job_id)
        for path in prompts.iterdir():  # their time is over; the job goes on
            path.unlink()
        job = done(await world.ended(job_id))
        assert job.result is not None
        assert job.result["measure"] == "esap"
        copy = world.store.files / "jobs" / job_id / "prompts.jsonl"
        assert [json.loads(line) for line in copy.read_text().splitlines()] == lines
        assert copy.stat().st_mode & 0o777 == 0o600
        assert 0 < job.result["scores"]["dev"]["plan"]["mean"] <= 1

    run(tmp_path, test)


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_replicas_share_the_queue_and_go_on_with_each_others_jobs(url: str, tmp_path: Path) -> None:
    async def test() -> None:
        worlds = [
            JobWorld(tmp_path / "files", url=url, replica=name, lease=15.0)
            for name in ("one", "two")
        ]
        one, two = worlds
        ids = [one.add(method="eep", settings=EEP, tag=tag, seed=5) for tag in ("a", "b")]
        for world in worlds:
            world.supervisor.start()
        try:
            async with asyncio.timeout(400):
                for job_id in ids:
                    await one.evaluated(job_id)
                assert None not in (one.worker, two.worker), "each of the two works on one"
                await one.supervisor.stop()
                jobs = [done(await one.ended(job_id)) for job_id in ids]
        finally:
            for world in worlds:
                await world.supervisor.stop()
        results = [job.result for job in jobs]
        assert None not in results
        digests = {result["digest"] for result in results if result is not None}
        assert len(digests) == 1, "same seed, same plan, whoever worked on it"
        for world in worlds:
            assert set(world.store.variants.all()) == {"a", "b"}
            world.store.close()

    asyncio.run(test())
