from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path

import pytest

from liveprune.pruning.errors import (
    CheckpointError,
    ConflictError,
    EngineError,
    PlanError,
    StoreError,
    VariantError,
)
from liveprune.pruning.plan_io import save_plan
from liveprune.server import operation_runner, state_folder
from liveprune.server.control_plane import ControlPlane
from liveprune.server.engine import LiveEngine
from liveprune.server.operations import State
from liveprune.server.registry import Registry
from tests.server.fake_engine import FakeEngine, fake_base, fake_plan
from tests.server.live_world import A, B, C, World, before_writes, run, saved_text, world


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_the_protocols_are_fulfilled(tmp_path: Path) -> None:
    """For mypy; at run time the other tests show it."""
    w = World(tmp_path)
    engine: LiveEngine = w.engine
    control: ControlPlane = w.control
    assert (engine, control) == (w.engine, w.control)


def test_a_fresh_server_serves_the_base(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            (view,) = await w.control.variants()
            assert (view.name, view.state, view.is_alias) == ("m:full", "live", True)
            status = await w.control.status()
            assert (status.model, status.alias, status.previous) == ("m", "m:full", None)
            assert status.ready
            assert status.operation is None
            # 24 rows of 1000, 20,000 other, 20 blocks of 500.
            assert (status.expert_bytes, status.kv_bytes) == (24_000, 10_000)
            assert status.memory_target_bytes == 54_000
            assert isinstance(w.control.directory, Registry)
            w.check()

    run(test())


def test_the_layers_of_a_variant_live_or_not(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("c", C)
            full, ours = await w.control.layers("full"), await w.control.layers("c")
            assert [(x.layer, x.remaining, x.top_k) for x in full] == [(i, 8, 2) for i in range(3)]
            assert [(x.kept, x.top_k) for x in ours] == [
                ((7,), 1),
                ((6, 7), 1),
                ((0, 1, 2, 3, 4, 5, 6, 7), 1),
            ]
            await w.ended(await w.control.remove("c"))
            assert await w.control.layers("c") == ours
            with pytest.raises(VariantError, match="'nothing' is unknown"):
                await w.control.layers("nothing")

    run(test())


def test_status_while_a_swap_runs(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            served = w.registry.resolve("m")
            assert served is not None
            w.registry.pin(served)
            operation = await w.control.swap("a")
            await w.until(lambda: operation.state is State.DRAINING)
            status = await w.control.status()
            assert status.operation is operation
            form = status.to_json()
            assert form["operation"]["state"] == "draining"
            assert {v["tag"]: (v["state"], v["in_flight"]) for v in form["variants"]} == {
                "full": ("draining", 1),
                "a": ("live", 0),
            }
            w.registry.unpin(served)
            await w.ended(operation)
            assert (await w.control.status()).operation is None

    run(test())


def test_one_operation_at_a_time(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            first = await w.control.add("a", w.plan_file(A))
            for second in (
                w.control.add("b", w.plan_file(B)),
                w.control.swap("full"),
                w.control.remove("full"),
                w.control.rollback(),
            ):
                with pytest.raises(ConflictError, match=f"operation {first.id} is under way: add"):
                    await second
            await w.ended(first)
            assert first.state is State.DONE
            assert (await w.add("b", B)).state is State.DONE

    run(test())


def test_two_requests_at_once(tmp_path: Path) -> None:
    """Both read their plans; only one may begin."""

    async def test() -> None:
        async with world(tmp_path) as w:
            results = await asyncio.gather(
                w.control.add("a", w.plan_file(A)),
                w.control.add("b", w.plan_file(B)),
                return_exceptions=True,
            )
            assert sorted(type(x).__name__ for x in results) == ["ConflictError", "Operation"]

    run(test())


def test_an_idempotency_key_returns_the_same_operation(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            plan = w.plan_file(A)
            first, again = await asyncio.gather(
                w.control.add("a", plan, "k1"), w.control.add("a", plan, "k1")
            )
            assert first is again
            await w.ended(first)
            plan.unlink()
            assert await w.control.add("a", plan, "k1") is first
            swap = await w.control.swap("a", idempotency_key="k2")
            assert await w.control.swap("a", idempotency_key="k2") is swap
            await w.ended(swap)
            back = await w.ended(await w.control.rollback(idempotency_key="k3"))
            assert await w.control.rollback(idempotency_key="k3") is back
            assert w.registry.alias == "full"
            remove = await w.ended(await w.control.add("a", idempotency_key="k4"))
            assert remove.state is State.DONE
            gone = await w.ended(await w.control.remove("a", True, "k5"))
            assert await w.control.remove("a", True, "k5") is gone
            with pytest.raises(ConflictError, match="idempotency key 'k2': came with"):
                await w.control.swap("full", idempotency_key="k2")

    run(test())


def test_plans_are_checked_before_anything_happens(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            calls = w.engine.calls.copy()
            before = w.snapshot()
            other = w._plans / "other.json"
            save_plan(fake_plan([0, 1, 2, 3], top_k=3), other)
            with pytest.raises(PlanError, match="top_k is 3, expected at most the model's 2"):
                await w.control.add("x", other)
            with pytest.raises(PlanError, match="not readable"):
                await w.control.add("x", w._plans / "none.json")
            for tag in ("full", "a:b", ""):
                with pytest.raises(VariantError, match="tag"):
                    await w.control.add(tag, other)
            with pytest.raises(VariantError, match="variant 'x' is unknown, expected one of full"):
                await w.control.add("x")
            with pytest.raises(VariantError, match="variant 'x' is unknown"):
                await w.control.swap("x")
            with pytest.raises(ConflictError, match="found no swap to roll back"):
                await w.control.rollback()
            assert (w.engine.calls, w.snapshot()) == (calls, before)
            assert w.control.operations() == []

    run(test())


def test_nothing_to_do(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            before = w.snapshot()
            calls = w.engine.calls.copy()
            for operation in (
                await w.control.add("a", w.plan_file(A)),
                await w.control.add("a"),
                await w.control.add("full"),
                await w.control.swap("full"),
            ):
                assert operation.state is State.DONE
                assert operation.notes == ["nothing to do"]
                assert operation.finished is not None
            await w.ended(await w.control.remove("a"))
            await w.ended(await w.control.add("a"))
            assert w.engine.calls != calls
            assert w.snapshot()["live"].keys() == before["live"].keys()

    run(test())


def test_removing_what_is_not_live_forgets_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            await w.ended(await w.control.remove("a"))
            assert {view.tag: view.state for view in await w.control.variants()} == {
                "a": "standby",
                "full": "live",
            }
            await w.ended(await w.control.remove("a"))
            assert [view.tag for view in await w.control.variants()] == ["full"]
            with pytest.raises(VariantError, match="'a' is unknown"):
                await w.control.swap("a")

    run(test())


def test_a_foreign_plan_is_stored_in_our_own_form(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            report = tmp_path / "report.json"
            names = [f'"model.layers.{i}.block_sparse_moe": [0, 1, 2]' for i in range(3)]
            report.write_text("{" + ", ".join(names) + "}")
            operation = await w.ended(await w.control.add("r", report))
            assert operation.state is State.DONE
            digest = w.registry.known["r"].digest
            assert digest is not None
            assert w.folder.store.plans.load(digest).layer(1).kept == (0, 1, 2)
            w.check()

    run(test())


def test_redefining_a_tag(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            old = w.registry.resolve("m:a")
            assert old is not None
            w.registry.pin(old)
            operation = await w.control.add("a", w.plan_file(C))
            await w.until(lambda: operation.state is State.DRAINING)
            new = w.registry.resolve("m:a")
            assert new is not None
            assert (old.slot, new.slot) == (1, 2)
            assert new.salt == f"m:a@{C.digest}#3"
            w.registry.unpin(old)
            await w.ended(operation)
            assert operation.state is State.DONE
            w.check()  # the old plan's files are gone

    run(test())


def test_redefining_a_tag_that_is_not_live(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            await w.ended(await w.control.remove("a"))
            w.engine.fail("publish")
            assert (await w.add("a", C)).state is State.FAILED
            assert w.registry.known["a"].digest == A.digest
            w.check()
            assert (await w.add("a", C)).state is State.DONE
            assert w.registry.known["a"].digest == C.digest
            w.check()

    run(test())


def test_removing(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            with pytest.raises(ConflictError, match="m:full: is what 'm' routes to; swap to an"):
                await w.control.remove("full")
            with pytest.raises(VariantError, match="base model, which is never forgotten"):
                await w.control.remove("full", forget=True)
            with pytest.raises(VariantError, match="variant 'x' is unknown"):
                await w.control.remove("x")
            operation = await w.ended(await w.control.remove("a"))
            assert list(operation.seconds) == ["queued", "draining", "releasing", "growing"]
            assert {v.tag: v.state for v in await w.control.variants()} == {
                "full": "live",
                "a": "standby",
            }
            w.check()
            await w.ended(await w.control.remove("a", forget=True))
            assert [v.tag for v in await w.control.variants()] == ["full"]
            w.check()

    run(test())


def test_forgetting_the_previous_variant(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            await w.add("b", B)
            await w.swap("a", keep=True)
            await w.swap("b", keep=True)
            await w.ended(await w.control.remove("a", forget=True))
            with pytest.raises(ConflictError, match="found no swap to roll back"):
                await w.control.rollback()
            w.check()

    run(test())


def test_what_a_running_experiment_needs_stays(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            needed = {"full": "halve", "a": "halve"}
            w.control._needed = lambda: needed
            for refused in (
                lambda: w.control.remove("a"),
                lambda: w.control.remove("a", forget=True),
                lambda: w.control.add("a", w.plan_file(B)),
            ):
                before = w.snapshot()
                with pytest.raises(ConflictError, match="m:a: the running experiment halve needs"):
                    await refused()
                assert w.snapshot() == before
            assert (await w.add("a", A)).state is State.DONE, "the same plan is no change"
            await w.add("b", B)
            # A swap leaves what it left; so does a roll-back.
            for change in (w.control.swap("b"), w.control.rollback(), w.control.swap("a")):
                operation = await w.ended(await change)
                assert operation.state is State.DONE
                assert {"full", "a", "b"} >= w.registry.live.keys() >= {"full", "a"}
            needed.clear()
            await w.swap("full")
            assert "a" not in w.registry.live, "as always"
            w.check()

    run(test())


def test_no_slot_is_left(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, slots=2) as w:
            await w.add("a", A)
            before = w.snapshot()
            operation = await w.add("b", B)
            assert "m:b: found no free slot, taken by m:a (live)" in operation.error
            assert w.snapshot() == before

    run(test())


def test_operations_are_remembered_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operation_runner, "KEPT", 3)

    async def test() -> None:
        async with world(tmp_path) as w:
            made = [await w.control.swap("full", idempotency_key=str(i)) for i in range(5)]
            assert w.control.operations() == made[:1:-1]
            assert w.control.operation(made[4].id) is made[4]
            with pytest.raises(VariantError, match="is unknown, or ended long ago"):
                w.control.operation(made[0].id)
            with pytest.raises(VariantError, match="is unknown"):
                await w.control.cancel(made[0].id)
            with pytest.raises(ConflictError, match="has ended: done"):
                await w.control.cancel(made[4].id)
            assert await w.control.swap("full", idempotency_key="0") is not made[0]

    run(test())


def test_too_late_to_cancel(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            served = w.registry.resolve("m")
            assert served is not None
            w.registry.pin(served)
            operation = await w.control.swap("a")
            await w.until(lambda: operation.state is State.DRAINING)
            with pytest.raises(ConflictError, match="is draining, too late to cancel; roll back"):
                await w.control.cancel(operation.id)
            w.registry.unpin(served)
            assert (await w.ended(operation)).state is State.DONE

    run(test())


def test_outcomes_are_counted(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            await w.swap("a")
            w.engine.fail("golden")
            await w.ended(await w.control.rollback())
            cancelled = await w.control.rollback()
            await w.control.cancel(cancelled.id)
            await w.ended(cancelled)
            assert w.control.outcomes == {
                ("add", "done"): 1,
                ("swap", "done"): 1,
                ("rollback", "failed"): 1,
                ("rollback", "cancelled"): 1,
            }

    run(test())


def test_requests_before_start_and_after_stop(tmp_path: Path) -> None:
    async def test() -> None:
        w = World(tmp_path)
        with pytest.raises(ConflictError, match="restoring its variants"):
            await w.control.swap("full")
        await w.control.start()
        await w.control.stop()
        with pytest.raises(ConflictError, match="the server is stopping"):
            await w.control.swap("full")

    run(test())


# Restarts: another engine and control plane over the same folder.


async def left_behind(folder: Path) -> None:
    """b serves the bare name, full is live beside it, a is known and the previous one."""
    async with world(folder) as w:
        await w.add("a", A)
        await w.swap("a", keep=True)
        await w.add("b", B)
        await w.swap("b")
        assert set(w.registry.live) == {"full", "b"}


@pytest.mark.parametrize("resident", [None, "a", "b"])
def test_a_restart_restores_what_was_live(resident: str | None, tmp_path: Path) -> None:
    """Whatever the engine came up with."""
    plan = {"a": A, "b": B}.get(resident or "")

    async def test() -> None:
        await left_behind(tmp_path)
        engine = FakeEngine(tmp_path / "base", resident=plan, resident_slot=1 if plan else 0)
        options = {} if plan is None else {"memory_target": 54_000}
        async with world(tmp_path, resident=resident, engine=engine, **options) as w:
            assert set(w.registry.live) == {"full", "b"}
            assert (w.registry.alias, w.registry.previous) == ("b", "a")
            assert w.registry.known.keys() == {"full", "a", "b"}
            assert w.registry.published > 3  # epochs are never given out twice
            # What the engine came up with goes only if it was not live before.
            assert w.engine.calls["retire"] == (resident == "a")
            w.check()
            await w.ended(await w.control.rollback())
            assert w.registry.alias == "a"
            w.check()

    run(test())


def test_golden_answers_outlive_a_restart(tmp_path: Path) -> None:
    async def test() -> None:
        await left_behind(tmp_path)
        engine = FakeEngine(tmp_path / "base")
        engine.corrupt.update({None, B.digest})
        w = World(tmp_path, engine=engine)
        problems = await w.control.start()
        assert problems[0].startswith("m:full: serves all the same, though its golden answers")
        assert "m:b: golden answers differ" in problems[1]
        assert "m:full serves m" in problems[1]
        assert len(problems) == 2
        assert w.registry.alias == "full"  # it is all there is: it serves
        assert (await w.control.status()).ready
        await w.control.stop()

    run(test())


def test_what_cannot_be_restored_is_reported_and_kept_on_record(tmp_path: Path) -> None:
    async def test() -> None:
        await left_behind(tmp_path)
        state = saved_text(tmp_path / "state")
        damaged = tmp_path / "state" / "plans" / f"{B.digest}.json"
        whole = damaged.read_text()
        damaged.write_text(whole[:100])
        w = World(tmp_path)
        (problem,) = await w.control.start()
        assert problem.startswith("m:b: ")
        assert problem.endswith("; add it again")
        assert str(damaged) in problem
        assert (w.registry.alias, w.registry.previous) == ("full", "a")
        assert saved_text(tmp_path / "state") == state
        assert (await w.add("c", C)).state is State.DONE
        assert w.read_state().variants["b"] == B.digest
        await w.control.stop()
        damaged.write_text(whole)
        async with world(tmp_path) as w:
            assert w.registry.known.keys() == {"full", "a", "b", "c"}

    run(test())


def test_the_previous_variant_cannot_be_read(tmp_path: Path) -> None:
    async def test() -> None:
        await left_behind(tmp_path)
        (tmp_path / "state" / "plans" / f"{A.digest}.json").unlink()
        w = World(tmp_path)
        (problem,) = await w.control.start()
        assert problem.startswith("m:a: ")
        assert (w.registry.alias, w.registry.previous) == ("b", None)
        assert (await w.control.status()).previous is None
        await w.control.stop()

    run(test())


def test_a_crash_while_restoring_loses_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            await w.add("b", B)
            await w.swap("b", keep=True)
        state = saved_text(tmp_path / "state")
        w = World(tmp_path)
        served: list[str] = []

        def look(method: str) -> None:
            if method == "prepare" and w.engine.calls["prepare"] == 2:  # b is live again
                served.extend(w.registry.live)
                served.append(saved_text(tmp_path / "state"))

        w.engine.on_call = look
        assert await w.control.start() == []
        assert served == ["full", "b", state]
        w.check()
        await w.control.stop()

    run(test())


def test_a_variant_that_cannot_be_made_live_at_start(tmp_path: Path) -> None:
    async def test() -> None:
        await left_behind(tmp_path)
        engine = FakeEngine(tmp_path / "base")
        engine.fail("prepare")
        w = World(tmp_path, engine=engine)
        (problem,) = await w.control.start()
        assert "injected before prepare; nothing has changed: m:full serves m" in problem
        assert w.registry.alias == "full"
        assert w.read_state().alias == "b"  # the next start tries again
        assert (await w.swap("b")).state is State.DONE
        w.check()
        await w.control.stop()

    run(test())


def test_stopped_while_restoring(tmp_path: Path) -> None:
    async def test() -> None:
        await left_behind(tmp_path)
        state = saved_text(tmp_path / "state")
        w = World(tmp_path)
        w.engine.hang("progress")
        start = asyncio.create_task(w.control.start())
        await w.until(lambda: w.engine.calls["progress"] == 1)
        with pytest.raises(ConflictError, match="restoring its variants"):
            await w.control.swap("full")
        await w.control.stop(5)
        (problem,) = await start
        assert "interrupted: the server stopped" in problem
        assert saved_text(tmp_path / "state") == state

    run(test())


def test_an_engine_that_came_up_with_something_else(tmp_path: Path) -> None:
    async def test() -> None:
        await left_behind(tmp_path)
        for resident, plan, slot in (("b", None, 0), (None, A, 1)):
            engine = FakeEngine(tmp_path / "base", resident=plan, resident_slot=slot)
            w = World(tmp_path, engine=engine)
            with pytest.raises(EngineError, match=rf"found the slots \[{slot}\] live, expected"):
                await w.control.start(resident)
            await w.control.stop()
        w = World(tmp_path)
        with pytest.raises(VariantError, match="expected the variant 'x'; found"):
            await w.control.start("x")
        await w.control.stop()

    run(test())


def test_a_memory_target_of_the_operators(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path / "more", memory_target=60_200) as w:
            assert w.engine.blocks == 32  # 16,200 bytes beside the weights
            w.check()
        async with world(tmp_path / "less", memory_target=48_000) as w:
            assert w.engine.blocks == 8
            assert (await w.control.status()).memory_target_bytes == 48_000
        w = World(tmp_path / "least", memory_target=45_999)
        with pytest.raises(EngineError, match="need 46,000 bytes, expected at most 45,999"):
            await w.control.start()
        await w.control.stop()

    run(test())


def test_another_model_on_the_same_folder(tmp_path: Path) -> None:
    async def test() -> None:
        await left_behind(tmp_path)
        fake_base(tmp_path / "base", vocab_size=256)
        with pytest.raises(CheckpointError, match="choose another state folder"):
            state_folder.StateFolder(tmp_path / "state", tmp_path / "base")

    run(test())


def test_a_copy_of_the_folder_is_all_that_is_needed(tmp_path: Path) -> None:
    """The plans are stored in it: the files they came from may go."""

    async def test() -> None:
        await left_behind(tmp_path)
        shutil.rmtree(tmp_path / "plans")
        async with world(tmp_path) as w:
            assert (await w.swap("a")).state is State.DONE
            w.check()

    run(test())


def test_a_full_disk_at_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def test() -> None:
        w = World(tmp_path)
        before_writes(monkeypatch, full)
        with pytest.raises((OSError, StoreError), match="No space left"):
            await w.control.start()
        await w.control.stop()

    run(test())
