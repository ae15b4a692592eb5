from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveprune.patches.live_types import KVStatus
from liveprune.pruning.errors import (
    ConflictError,
    DataError,
    EngineError,
    IncompatibleEnvironmentError,
    LiveprunError,
    PlanError,
)
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.server.operations import State
from tests.server.fake_engine import EXPERTS, LAYERS, METHODS, READS, fake_plan, plan_number
from tests.server.live_world import A, B, C, World, run, world

ROWS = [TokenRow((1, 2), (3, 4)), TokenRow((5,), (6,))]
FULL_KV = KVStatus(blocks=20, min_blocks=4, max_blocks=20, block_bytes=500)


def merged(count: int) -> Plan:
    """Merges ``count`` experts in each layer: each takes a spare row."""
    mix = np.full((count, EXPERTS), 1 / EXPERTS, np.float32) + np.eye(count, EXPERTS, dtype="f4")
    layers = [LayerPlan(i, EXPERTS, 1, merge=mix, router_map=mix) for i in range(LAYERS)]
    return Plan("mixtral", LAYERS, tuple(layers), Lineage("test"))


def number(found: AnswerScores | LiveprunError) -> float:
    assert isinstance(found, AnswerScores), found
    assert found.predicted.tolist() == [3, 4, 6]
    assert len(set(found.logprobs.tolist())) == 1
    return float(found.logprobs[0])


def test_each_plan_is_scored_and_nothing_is_left(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, row_bytes=500) as w:
            await w.add("a", A)
            before, seen = w.snapshot(), []
            w.engine.on_call = lambda method: seen.append(
                (method, w.registry.cards(), w.registry.saved().live, len(w.registry.views({})))
            )
            plans = [A, None, B, merged(4), C]
            found = await w.control.candidates.score(plans, ROWS, against_full=True)
            assert [number(x) for x in found] == [plan_number(plan) for plan in plans]
            assert all(isinstance(x, AnswerScores) and x.overlap is not None for x in found)
            assert w.snapshot() == before
            assert w.engine.references == [None]
            assert w.engine.reference == ()
            cards, live = w.registry.cards(), w.registry.saved().live
            assert {(str(c), lives, count) for _, c, lives, count in seen} == {
                (str(cards), live, 2)
            }
            methods = [method for method, *_ in seen]
            assert methods.count("score") == 5
            assert methods.count("prepare") == 3, "what is live already is used as it is"
            assert w.control.operations()[0].kind == "add", "searches are not remembered"
            assert w.control.outcomes.total() == 1
            w.check()

    run(test())


def test_generation_under_each_plan(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            before = w.snapshot()
            found = await w.control.candidates.generate(
                [B, None], [(1,), (2, 3)], max_tokens=7, end={5, 4}
            )
            assert found == [[(int(plan_number(plan)), 7, 4, 5)] * 2 for plan in (B, None)]
            assert w.snapshot() == before

    run(test())


def test_the_full_model_comes_back_for_a_moment_where_it_is_not_live(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            await w.swap("a")
            assert set(w.registry.live) == {"a"}
            before = w.snapshot()
            found = await w.control.candidates.score([B], ROWS, against_full=True)
            assert number(found[0]) == plan_number(B)
            assert w.snapshot() == before
            w.check()

    run(test())


def test_a_plan_that_does_not_fit_is_its_own_error(tmp_path: Path) -> None:
    foreign = Plan("other", LAYERS, B.layers, Lineage("test"))

    async def test() -> None:
        async with world(tmp_path, row_bytes=500) as w:
            before = w.snapshot()
            found = await w.control.candidates.score([foreign, merged(5), B, merged(4)], ROWS)
            assert isinstance(found[0], PlanError)
            assert isinstance(found[1], EngineError)
            assert "merges 5 experts, found 4 free spare rows" in str(found[1])
            assert number(found[2]) == plan_number(B)
            assert number(found[3]) == plan_number(merged(4)), "the rows of the one before are free"
            assert w.snapshot() == before

    run(test())


def test_the_memory_target_holds(tmp_path: Path) -> None:
    """Room comes from the KV cache, or there is a clear error; and goes back there."""

    async def test() -> None:
        async with world(tmp_path, kv=FULL_KV) as w:
            found = await w.control.candidates.score([merged(2)], ROWS)
            assert number(found[0]) == plan_number(merged(2))
            w.check()
        async with world(tmp_path / "small", kv=FULL_KV, spare_rows=8) as w:
            before = w.snapshot()
            (failed,) = await w.control.candidates.score([merged(8)], ROWS)
            assert "memory target: 24,000 bytes of new expert rows" in str(failed)
            assert w.snapshot() == before
            w.check()

    run(test())


def test_no_free_slot_is_an_error(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, slots=2) as w:
            await w.add("a", A)
            (failed,) = await w.control.candidates.score([B], ROWS)
            assert "found no free slot, taken by m:a (live)" in str(failed)
            w.check()

    run(test())


def test_bad_tokens_are_refused_before_anything(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            calls = w.engine.calls.copy()
            for rows in ([TokenRow((1,), (128,))], [TokenRow((-1,), (1,))]):
                with pytest.raises(DataError, match="expected 0 to 127"):
                    await w.control.candidates.score([B], rows)
            with pytest.raises(DataError, match="found the token 500"):
                await w.control.candidates.generate([B], [(500,)], max_tokens=1, end=())
            w.engine.by_priority = False
            with pytest.raises(IncompatibleEnvironmentError, match="expected priority"):
                await w.control.candidates.score([B], ROWS)
            assert w.engine.calls == calls

    run(test())


@pytest.mark.parametrize("method", METHODS)
def test_every_single_fault_leaves_nothing_behind(method: str, tmp_path: Path) -> None:
    plans = [B, merged(4), None]

    async def calls() -> int:
        async with world(tmp_path / "count", row_bytes=500) as w:
            before = w.engine.calls[method]
            await w.control.candidates.score(plans, ROWS, against_full=True)
            return w.engine.calls[method] - before

    async def fault(when: str, first: int) -> None:
        async with world(tmp_path / f"{when}-{first}", row_bytes=500) as w:
            before = w.snapshot()
            w.engine.fail(method, when, first=first)
            try:
                found = await w.control.candidates.score(plans, ROWS, against_full=True)
            except EngineError as error:
                found = [error] * len(plans)
            for one, plan in zip(found, plans, strict=True):
                if isinstance(one, AnswerScores):
                    assert number(one) == plan_number(plan)
                else:
                    assert "injected" in str(one)
            w.engine.heal()
            assert w.engine.violations == []
            if w.snapshot() != before:
                # What could not be undone is, with the next call.
                assert "m:candidate" not in str(w.registry.views({}))
                await w.control.candidates.score([B], ROWS)
            assert w.snapshot() == before
            w.check()

    async def test() -> None:
        for number_of_call in range(1, await calls() + 1):
            for when in ("before",) if method in READS else ("before", "after"):
                await fault(when, number_of_call)

    run(test())


def test_what_fails_while_scoring_fails_the_call(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            before = w.snapshot()
            for method in ("score", "keep_reference"):
                w.engine.fail(method)
                with pytest.raises(EngineError, match=f"injected before {method}"):
                    await w.control.candidates.score([B], ROWS, against_full=True)
                assert w.snapshot() == before

    run(test())


def test_a_score_that_takes_too_long_ends(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, limits={State.SCORING: 0.05}) as w:
            before = w.snapshot()
            w.engine.hang("score")
            with pytest.raises(EngineError, match=r"scoring took longer than 0.05 s"):
                await w.control.candidates.score([B], ROWS)
            assert w.snapshot() == before

    run(test())


async def begun(w: World, method: str = "score") -> asyncio.Task[Any]:
    """A call that hangs in ``method``."""
    w.engine.hang(method)
    task = asyncio.create_task(w.control.candidates.score([B], ROWS))
    calls = w.engine.calls[method]
    await w.until(lambda: w.engine.calls[method] > calls)
    return task


@pytest.mark.parametrize("method", ["prepare", "publish", "score"])
def test_it_gives_way_to_operations(method: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, grace=0.05) as w:
            await w.add("a", A)
            task = await begun(w, method)
            current = (await w.control.status()).operation
            assert current is not None
            assert current.kind == "score"
            operation = await w.swap("a")
            assert operation.state is State.DONE
            with pytest.raises(ConflictError, match="interrupted"):
                await task
            assert (await w.control.status()).operation is None
            w.check()
            await w.ended(await w.control.rollback())
            w.check()
            for change in (
                lambda: w.control.add("b", w.plan_file(B)),
                lambda: w.control.remove("a"),
            ):
                task = await begun(w)
                assert (await w.ended(await change())).state is State.DONE
                with pytest.raises(ConflictError):
                    await task
                w.check()

    run(test())


def test_an_operation_under_way_is_a_conflict(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            operation = await w.control.add("a", w.plan_file(A))
            with pytest.raises(ConflictError, match="is under way: add of m:a"):
                await w.control.candidates.score([B], ROWS)
            await w.ended(operation)
            task = await begun(w)
            with pytest.raises(ConflictError, match="is under way: score"):
                await w.control.candidates.score([B], ROWS)
            task_operation = (await w.control.status()).operation
            assert task_operation is not None
            await w.control.cancel(task_operation.id)
            with pytest.raises(ConflictError, match="interrupted"):
                await task
            w.check()

    run(test())


def test_a_caller_that_goes_away_and_a_stop(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            before = w.snapshot()
            task = await begun(w)
            task.cancel()
            await asyncio.wait({task})
            await w.control.swap("full")  # gives way although nobody waits for it
            await w.until(lambda: w.snapshot() == before)
        async with world(tmp_path / "stop") as w:
            before = w.snapshot()
            task = await begun(w)
            await w.control.stop(1)
            with pytest.raises(ConflictError):
                await task
            assert w.snapshot() == before

    run(test())


def test_before_the_start_nothing_is_scored(tmp_path: Path) -> None:
    async def test() -> None:
        w = World(tmp_path)
        with pytest.raises(ConflictError, match="restoring"):
            await w.control.candidates.score([fake_plan([0])], ROWS)
        w.folder.close()

    run(test())


def test_files_of_a_killed_server_are_removed(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            left = w.folder.candidate_path("00ff")
            left.write_text("{}")
        async with world(tmp_path):
            assert not left.exists()

    run(test())


@pytest.mark.parametrize("seed", range(4))
def test_searches_and_operators_at_any_moment(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever meets whatever: operations succeed, scores are right or interrupted."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    choose = random.Random(seed)
    plans = [A, B, C, None, merged(2), merged(4)]

    async def search(w: World) -> int:
        """Scores a few plans; asks again when interrupted. Returns how often it was."""
        asked = choose.sample(plans, 3)
        for interruptions in range(1000):
            try:
                found = await w.control.candidates.score(asked, ROWS, against_full=True)
            except ConflictError:
                await asyncio.sleep(0.001)
                continue
            assert [number(x) for x in found] == [plan_number(plan) for plan in asked]
            return interruptions
        raise AssertionError("never its turn")

    async def test() -> None:
        interrupted = 0
        async with world(tmp_path, slots=6, row_bytes=300) as w:
            assert (await w.add("a", A)).state is State.DONE
            for _ in range(25):
                task = asyncio.create_task(search(w))
                for _ in range(choose.randrange(120)):
                    await asyncio.sleep(0)
                if choose.random() < 0.7:
                    tag = choose.choice(["a", "full"])
                    if choose.random() < 0.5:
                        operation = await w.control.swap(tag, choose.random() < 0.5)
                    else:
                        operation = await w.control.add("b", w.plan_file(choose.choice([B, C])))
                    assert (await w.ended(operation)).state is State.DONE
                interrupted += await task
                w.check()
        assert interrupted > 5

    run(test())
