from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.errors import ConflictError
from liveprune.pruning.plan import Plan
from liveprune.server.operations import Operation, State
from tests.server.fake_engine import METHODS, READS, FakeEngine, fake_plan
from tests.server.live_world import A, B, C, World, before_writes, run, world


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


Begin = Callable[[World], Awaitable[Operation]]


async def add_b(w: World) -> Operation:
    return await w.control.add("b", w.plan_file(B))


async def swap_a(w: World) -> Operation:
    return await w.control.swap("a")


async def swap_a_keep(w: World) -> Operation:
    return await w.control.swap("a", keep_previous=True)


async def redefine_a(w: World) -> Operation:
    return await w.control.add("a", w.plan_file(C))


async def remove_a(w: World) -> Operation:
    return await w.control.remove("a")


async def rollback(w: World) -> Operation:
    return await w.control.rollback()


async def nothing(w: World) -> None:
    """Only the base model is live and known."""


async def a_standby(w: World) -> None:
    await w.add("a", A)
    await w.ended(await w.control.remove("a"))


async def a_live(w: World) -> None:
    await w.add("a", A)


async def a_alone(w: World) -> None:
    await w.add("a", A)
    await w.swap("a")


async def b_alone(w: World) -> None:
    """Both a and the base are standby; the previous is a."""
    await a_alone(w)
    await w.add("b", B)
    await w.swap("b")


CASES: dict[str, tuple[Callable[[World], Awaitable[None]], Begin, set[str]]] = {
    "add": (nothing, add_b, {"full", "b"}),
    "add beside": (a_alone, add_b, {"a", "b"}),
    "redefine": (a_live, redefine_a, {"full", "a"}),
    "redefine the alias": (a_alone, redefine_a, {"a"}),
    "remove": (a_live, remove_a, {"full"}),
    "swap": (a_standby, swap_a, {"a"}),
    "swap to live": (a_live, swap_a, {"a"}),
    "swap and keep": (a_standby, swap_a_keep, {"full", "a"}),
    "roll back to the base": (a_alone, rollback, {"full"}),
    "roll back": (b_alone, rollback, {"a"}),
}


@pytest.mark.parametrize("case", CASES)
def test_clean(case: str, tmp_path: Path) -> None:
    prepare, begin, live = CASES[case]

    async def test() -> None:
        async with world(tmp_path) as w:
            await prepare(w)
            w.check()
            operation = await w.ended(await begin(w))
            assert (operation.state, operation.error) == (State.DONE, "")
            assert operation.finished is not None
            assert set(w.registry.live) == live
            w.check()

    run(test())


def test_states_of_a_swap(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await a_alone(w)
            before = w.engine.blocks
            operation = await w.control.swap("full")
            seen: list[State] = []
            while not operation.state.ended:
                if operation.state not in seen[-1:]:
                    seen.append(operation.state)
                await asyncio.sleep(0)
            assert seen == [
                State.QUEUED, State.MAKING_ROOM, State.FILLING, State.PUBLISHING, State.CANARY,
                State.SWITCHING, State.DRAINING, State.RELEASING, State.GROWING, State.CANARY,
            ]  # fmt: skip
            assert list(operation.seconds) == [state.value for state in seen[:-1]]
            # a needs 12 of the base's 24 rows: the other 12 came, and nothing went.
            assert operation.bytes_total == operation.bytes_done == 12 * 1000
            assert operation.freed_bytes == 0
            # 12 rows of 1000 bytes were worth 24 blocks of 500.
            assert (before, w.engine.blocks) == (44, 20)

    run(test())


def test_a_swap_to_fewer_experts_frees_their_bytes(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            operation = await w.swap("a")
            assert operation.freed_bytes == 12 * 1000
            assert w.engine.blocks == 20 + 24
            assert operation.to_json()["state"] == "done"

    run(test())


@pytest.mark.parametrize("case", CASES)
def test_one_fault_anywhere(case: str, tmp_path: Path) -> None:
    """Every call of every method fails once, before and after its effect."""
    prepare, begin, _ = CASES[case]

    async def calls() -> dict[str, int]:
        async with world(tmp_path / "count") as w:
            await prepare(w)
            before = w.engine.calls.copy()
            await w.ended(await begin(w))
            return {method: w.engine.calls[method] - before[method] for method in METHODS}

    async def fault(method: str, when: str, number: int) -> None:
        async with world(tmp_path / f"{method}-{when}-{number}") as w:
            await prepare(w)
            before = w.snapshot()
            w.engine.fail(method, when, first=number)
            operation = await w.ended(await begin(w))
            await assert_whole(w, operation, before)

    async def test() -> None:
        failed = 0
        for method, count in (await calls()).items():
            for when in ("before",) if method in READS else ("before", "after"):
                for number in range(1, count + 1):
                    await fault(method, when, number)
                    failed += 1
        assert failed > 5

    run(test())


async def assert_whole(w: World, operation: Operation, before: dict[str, Any]) -> None:
    """After a failure: as before, or switched; in both cases consistent, and able to go on."""
    assert w.engine.violations == []
    assert w.registry.resolve("m") is not None
    if operation.state is State.DONE:  # only where the failed call had done its work
        w.check()
        return
    assert operation.state is State.FAILED
    assert "injected" in operation.error
    assert "\n" not in operation.error
    assert f"m:{w.registry.alias} serves m" in operation.error
    if "nothing has changed" in operation.error:
        assert w.snapshot() == before
        w.check()
        return
    # The names have moved, or the slot is gone; only rows and KV blocks may be left to tidy up.
    assert State.SWITCHING.value in operation.seconds or operation.kind == "remove"
    assert w.engine.live == {p.served.slot for p in w.registry.publications}
    again = await w.add("tidy", fake_plan([0, 1]))
    assert again.state is State.DONE
    leftover = [p for p in w.registry.publications if p.phase.value == "leftover"]
    assert leftover == []
    await w.ended(await w.control.remove("tidy", forget=True))
    w.check()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_fails_for_good(case: str, method: str, tmp_path: Path) -> None:
    """Nor can the change be undone then; what served serves on, and all is mended later."""
    prepare, begin, _ = CASES[case]

    async def test() -> None:
        async with world(tmp_path, slots=6) as w:
            await prepare(w)
            served = w.registry.resolve("m")
            calls = w.engine.calls[method]
            w.engine.fail(method, times=10_000)
            operation = await w.ended(await begin(w))
            if w.engine.calls[method] == calls:
                assert operation.state is State.DONE  # it needed no such call
                return
            assert operation.state is State.FAILED
            assert w.engine.violations == []
            assert f"m:{w.registry.alias} serves m" in operation.error
            if "nothing has changed" in operation.error or "not all could be" in operation.error:
                assert w.registry.resolve("m") == served
            w.engine.heal()
            assert (await w.add("tidy", fake_plan([0, 1]))).state is State.DONE
            await w.ended(await w.control.remove("tidy", forget=True))
            w.check()

    run(test())


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write of an operation fails in its turn, and all writes after it."""
    prepare, begin, _ = CASES[case]
    left = [10_000]

    def write() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    before_writes(monkeypatch, write)

    async def attempt(writes: int) -> bool:
        async with world(tmp_path / str(writes)) as w:
            await prepare(w)
            before = w.snapshot()
            files = before.pop("files")
            if begin in (add_b, redefine_a):
                w.plan_file(B), w.plan_file(C)
            w.plan_file = lambda plan: w._plans / f"{plan.digest}.json"  # type: ignore[method-assign]
            left[0] = writes
            operation = await w.ended(await begin(w))
            done = left[0] >= 0
            left[0] = 10_000
            if done:
                assert operation.state is State.DONE
                return False
            assert operation.state is State.FAILED
            assert "No space left" in operation.error
            assert w.registry.alias == w.read_state().alias
            if "nothing has changed" in operation.error:
                after = w.snapshot()
                assert after.pop("files") == files
                assert after == before
            else:  # the old variant could not be taken off the record: it stays live
                assert "still holds its slot and rows" in operation.error
            return True

    async def test() -> None:
        writes = 0
        while await attempt(writes):
            writes += 1
        assert writes > 0

    run(test())


@pytest.mark.parametrize(
    ("state", "method"),
    [
        (State.MAKING_ROOM, "resize_kv"),
        (State.MAKING_ROOM, "release"),
        (State.FILLING, "prepare"),
        (State.FILLING, "progress"),
        (State.PUBLISHING, "publish"),
        (State.CANARY, "golden"),
    ],
)
def test_a_call_that_never_returns(state: State, method: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, limits={state: 0.3}, grace=0.01) as w:
            await a_alone(w)
            before = w.snapshot()
            w.engine.hang(method)
            operation = await w.ended(await w.control.add("full"))
            assert operation.error.startswith(f"{state} took longer than 0.3 s; nothing has ch")
            assert w.snapshot() == before
            w.check()

    run(test())


@pytest.mark.parametrize(
    ("state", "method", "first", "live"),
    [
        (State.DRAINING, "retire", 1, {"full", "a"}),
        (State.RELEASING, "release", 2, {"a"}),  # the first is that of making room
        (State.GROWING, "resize_kv", 1, {"a"}),
        (State.CANARY, "golden", 2, {"a"}),
    ],
)
def test_a_call_that_never_returns_after_the_switch(
    state: State, method: str, first: int, live: set[str], tmp_path: Path
) -> None:
    async def test() -> None:
        async with world(tmp_path, limits={state: 0.3}, grace=0.01) as w:
            await a_standby(w)
            w.engine.hang(method, first=first)
            operation = await w.swap("a")
            assert operation.state is State.FAILED
            assert operation.error.startswith(f"{state} took longer than 0.3 s")
            assert "; m:a serves m" in operation.error
            assert set(w.registry.live) == live
            assert (await w.add("b", B)).state is State.DONE
            w.check()

    run(test())


def test_filling_that_fails(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            before = w.snapshot()
            w.engine.fill_error = "layer 1, expert 3: checksum differs"
            operation = await w.add("b", B)
            assert operation.state is State.FAILED
            assert "layer 1, expert 3: checksum differs" in operation.error
            assert w.snapshot() == before

    run(test())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("bug\nin two lines"), "RuntimeError: bug in two lines"),
        (TimeoutError("of a socket"), "TimeoutError: of a socket"),  # not that of the state
    ],
)
def test_unexpected_exceptions_are_reported_and_undone(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(slot: int) -> None:
        raise error

    async def test() -> None:
        async with world(tmp_path) as w:
            before = w.snapshot()
            monkeypatch.setattr(w.engine, "publish", broken)
            operation = await w.add("b", B)
            assert operation.error.startswith(f"{said}; nothing has changed")
            assert w.snapshot() == before

    run(test())


def test_room_is_made_only_as_requests_let_go(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await a_alone(w)
            w.engine.used_blocks = 40  # of 44; the base's rows need 24
            operation = await w.control.swap("full")
            await w.until(lambda: w.engine.calls["resize_kv"] > 20)
            assert operation.state is State.MAKING_ROOM
            assert w.engine.blocks == 40
            w.engine.used_blocks = 10
            await w.ended(operation)
            assert operation.state is State.DONE
            w.check()

    run(test())


def test_rows_that_exceed_the_target_are_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await a_alone(w)
        engine = FakeEngine(w.base, resident=A, resident_slot=1)
        async with world(tmp_path, resident="a", engine=engine) as w:
            before = w.snapshot()
            operation = await w.ended(await w.control.add("full"))
            # 12 rows of 1000 + 20,000 + 20 blocks of 500 = 42,000 bytes at start. With 12 rows
            # more and the 4 blocks that the cache needs at least: 46,000.
            assert "12,000 bytes of new expert rows beside 32,000 bytes" in operation.error
            assert "need 46,000 bytes, expected at most 42,000" in operation.error
            assert w.snapshot() == before
            w.check()

    run(test())


def golden_lies(w: World, plan: Plan | None) -> None:
    w.engine.corrupt.add(None if plan is None else plan.digest)


def test_a_golden_mismatch_blocks_the_swap(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await a_standby(w)
            before = w.snapshot()
            golden_lies(w, A)
            operation = await w.swap("a")
            assert operation.state is State.FAILED
            assert "m:a: golden answers differ: prompt 0, token 3: found token" in operation.error
            assert "nothing has changed: m:full serves m" in operation.error
            assert w.snapshot() == before
            assert w.control.golden_mismatches == 1
            w.check()

    run(test())


def test_a_live_variant_that_lies_is_not_promoted(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await a_live(w)
            before = w.snapshot()
            golden_lies(w, A)
            assert (await w.swap("a")).state is State.FAILED
            assert w.snapshot() == before

    run(test())


@pytest.mark.parametrize("prepare", [a_standby, a_live])
def test_a_mismatch_after_compaction_goes_back(
    prepare: Callable[[World], Awaitable[None]], tmp_path: Path
) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await prepare(w)
            w.engine.corrupt_on_release.add(A.digest)
            operation = await w.swap("a")
            assert operation.state is State.FAILED
            assert "m:a: golden answers changed by compaction: prompt 0" in operation.error
            assert operation.error.endswith("; m:full serves m")
            assert set(w.registry.live) == {"full"}
            assert w.registry.previous is None
            assert w.registry.known.keys() == {"full", "a"}
            served = w.registry.resolve("m")
            assert served is not None
            assert served.salt == f"m:full@base#{w.registry.published}"
            assert any("going back to m:full" in note for note in operation.notes)
            assert w.control.golden_mismatches == 1
            w.check()

    run(test())


def test_a_mismatch_after_a_redefinition_goes_back(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await a_alone(w)
            w.engine.corrupt_on_release.add(C.digest)
            operation = await w.ended(await redefine_a(w))
            assert operation.state is State.FAILED
            assert w.registry.known["a"].digest == A.digest
            assert w.registry.live["a"].variant.digest == A.digest
            assert w.registry.alias == "a"
            w.check()

    run(test())


def test_going_back_may_fail_too(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await a_standby(w)
            w.engine.corrupt_on_release.add(A.digest)
            w.engine.fail("prepare", first=2)  # the first is the swap's own
            operation = await w.swap("a")
            assert operation.state is State.FAILED
            assert "and going back: injected before prepare; m:a serves m, r" in operation.error
            assert w.registry.alias == "a"
            w.check()

    run(test())


def test_what_lies_is_taken_from_its_name_while_its_streams_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, limits={State.DRAINING: 0.3}) as w:
            await a_live(w)
            bad = w.registry.resolve("m:a")
            assert bad is not None
            w.registry.pin(bad)
            w.engine.corrupt_on_release.add(A.digest)
            operation = await w.swap("a")
            assert "draining took longer than 0.3 s (1 requests still run)" in operation.error
            assert w.registry.resolve("m:a") is None
            assert w.registry.alias == "full"
            w.registry.unpin(bad)
            assert (await w.add("b", B)).state is State.DONE  # clears the leftover first
            w.check()

    run(test())


def at_call(w: World, number: int, action: Callable[[], object]) -> None:
    """Do ``action`` within the engine's ``number``-th call from now on."""
    left = iter([False] * (number - 1) + [True])

    def look(_: str) -> None:
        if next(left, False):
            action()

    w.engine.on_call = look


@pytest.mark.parametrize("case", CASES)
def test_cancelled_by_an_operator_at_each_call(case: str, tmp_path: Path) -> None:
    prepare, begin, _ = CASES[case]

    async def attempt(number: int) -> State | None:
        async with world(tmp_path / str(number)) as w:
            await prepare(w)
            before = w.snapshot()
            operation = await begin(w)
            cancelled: list[State] = []

            def cancel() -> None:
                state = operation.state
                with contextlib.suppress(ConflictError):
                    w.control._runner.cancel(operation.id)
                    cancelled.append(state)

            at_call(w, number, cancel)
            await w.ended(operation)
            if not cancelled:
                assert operation.state is State.DONE
                w.check()
                return None
            if operation.state is State.CANCELLED:
                assert operation.error == ""
                assert operation.notes[-1].startswith("cancelled; nothing has changed: m:")
                assert w.snapshot() == before
            else:  # in the very call that takes the slot out of the engine
                assert (operation.kind, cancelled) == ("remove", [State.DRAINING])
                assert operation.state is State.DONE
                assert operation.notes[0].startswith("cancelled too late")
            w.check()
            return cancelled[0]

    async def test() -> None:
        seen: list[State] = []
        while (state := await attempt(len(seen) + 1)) is not None:
            seen.append(state)
        if case == "remove":
            expected = {State.DRAINING}
        elif prepare is a_live and begin is swap_a:
            expected = {State.CANARY}
        else:
            expected = {State.MAKING_ROOM, State.FILLING, State.PUBLISHING, State.CANARY}
        assert set(seen) == expected

    run(test())


def test_cancelled_before_it_began(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            before = w.snapshot()
            operation = await add_b(w)
            await w.control.cancel(operation.id)
            await w.ended(operation)
            assert operation.state is State.CANCELLED
            assert operation.notes == ["cancelled before it began"]
            assert w.snapshot() == before
            assert (await w.ended(await add_b(w))).state is State.DONE

    run(test())


def test_cancelled_while_a_plan_is_written(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            before = w.snapshot()
            operation = await add_b(w)
            await asyncio.sleep(0)
            assert operation.state is State.QUEUED
            await w.control.cancel(operation.id)
            await w.ended(operation)
            assert operation.state is State.CANCELLED
            assert w.snapshot() == before

    run(test())


@pytest.mark.parametrize("case", CASES)
def test_interrupted_by_the_end_of_the_server(case: str, tmp_path: Path) -> None:
    """At every call to the engine: undone before the switch, kept after it."""
    prepare, begin, live = CASES[case]

    async def attempt(number: int) -> str | None:
        async with world(tmp_path / str(number)) as w:
            await prepare(w)
            before = w.snapshot()
            operation = await begin(w)
            stops: list[asyncio.Task[None]] = []
            at_call(w, number, lambda: stops.append(asyncio.create_task(w.control.stop(5))))
            await w.ended(operation)
            await asyncio.gather(*stops)
            assert w.engine.violations == []
            if operation.state is State.DONE:
                return None
            assert operation.state is State.FAILED
            assert operation.error.startswith("interrupted: the server stopped; ")
            assert f"m:{w.registry.alias} serves m" in operation.error
            if "nothing has changed" in operation.error:
                assert w.snapshot() == before
                return "undone"
            assert w.registry.alias == w.read_state().alias
            assert live <= set(w.registry.live)
            assert w.engine.live == {p.served.slot for p in w.registry.publications}
            assert {p.phase.value for p in w.registry.publications} <= {"live", "leftover"}
            return "kept"

    async def test() -> None:
        seen: list[str] = []
        while (outcome := await attempt(len(seen) + 1)) is not None:
            seen.append(outcome)
        assert seen == sorted(seen, reverse=True)  # once kept, always kept
        # A removal makes no call that could be undone: its first takes the slot out.
        assert set(seen) == ({"kept"} if case == "remove" else {"kept", "undone"})

    run(test())


@pytest.mark.parametrize("case", CASES)
def test_interrupted_while_a_file_is_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved and what serves agree, whichever write is interrupted."""
    prepare, begin, _ = CASES[case]
    before_write: list[Callable[[], object]] = []

    def write() -> None:
        if before_write:
            before_write.pop()()

    before_writes(monkeypatch, write)

    async def attempt(number: int) -> bool:
        async with world(tmp_path / str(number)) as w:
            await prepare(w)
            before = w.snapshot()
            operation = await begin(w)
            loop = asyncio.get_running_loop()
            stops: list[asyncio.Task[None]] = []

            def stop() -> None:
                stops.append(loop.create_task(w.control.stop(5)))

            before_write[:] = [lambda: loop.call_soon_threadsafe(stop)] + [int] * (number - 1)
            await w.ended(operation)
            await asyncio.sleep(0.001)
            await asyncio.gather(*stops)
            before_write.clear()
            assert w.engine.violations == []
            state = w.read_state()
            assert (state.alias, state.previous) == (w.registry.alias, w.registry.previous)
            assert set(state.live) == set(w.registry.live)
            assert w.engine.live == {p.served.slot for p in w.registry.publications}
            assert {p.phase.value for p in w.registry.publications} <= {"live", "leftover"}
            if "nothing has changed" in operation.error:
                assert w.snapshot() == before
            return bool(stops)

    async def test() -> None:
        number = 1
        while await attempt(number):
            number += 1
        assert number > 1

    run(test())


def test_streams_begun_on_the_old_variant_end_on_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            old = w.registry.resolve("m")
            assert old is not None
            w.registry.pin(old)
            w.engine.busy[old.slot] = 1
            operation = await w.control.swap("a")
            await w.until(lambda: operation.state is State.DRAINING)
            assert w.registry.resolve("m") == w.registry.resolve("m:a") != old
            assert w.registry.resolve("m:full") is None
            for _ in range(20):
                await asyncio.sleep(0)
            assert old.slot in w.engine.live
            w.registry.unpin(old)  # the front door is done, the engine not yet
            await w.until(lambda: w.engine.calls["retire"] > 3)
            assert old.slot in w.engine.live
            w.engine.busy[old.slot] = 0
            await w.ended(operation)
            assert operation.state is State.DONE
            assert w.engine.live == {w.registry.live["a"].served.slot}
            w.check()

    run(test())


@pytest.mark.parametrize("holder", ["front door", "engine"])
def test_a_stream_that_never_ends_keeps_the_old_variant_live(holder: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, limits={State.DRAINING: 0.3}) as w:
            await w.add("a", A)
            old = w.registry.resolve("m")
            assert old is not None
            if holder == "engine":
                w.engine.busy[old.slot] = 1
            else:
                w.registry.pin(old)
            operation = await w.swap("a")
            assert operation.state is State.FAILED
            assert "m:a serves m, m:full still holds its slot and rows" in operation.error
            assert w.registry.alias == "a"
            assert w.registry.resolve("m:full") == old
            w.check()

    run(test())


def test_a_draining_redefinition_is_retired_by_the_next_operation(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, limits={State.DRAINING: 0.3}) as w:
            await a_live(w)
            old = w.registry.resolve("m:a")
            assert old is not None
            w.registry.pin(old)
            operation = await w.ended(await redefine_a(w))
            assert operation.state is State.FAILED
            assert w.registry.live["a"].variant.digest == C.digest
            assert old.slot in w.engine.live
            assert (await w.add("b", B)).state is State.DONE  # its stream still runs
            assert old in [p.served for p in w.registry.publications]
            w.registry.unpin(old)
            await w.ended(await w.control.remove("b"))
            await w.ended(await w.control.add("b"))
            assert old not in [p.served for p in w.registry.publications]
            w.check()

    run(test())


def test_asking_again_takes_out_what_could_not_be_undone(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            w.engine.fail("golden")
            w.engine.fail("retire")  # the undoing fails, too
            operation = await w.add("b", B)
            assert "injected before golden; not all could be undone: m:full s" in operation.error
            assert any("not undone: publishing: injected" in note for note in operation.notes)
            assert w.engine.live == {0, 1}
            assert {v.tag: v.state for v in await w.control.variants()}["b"] == "draining"
            operation = await w.swap("full")
            assert operation.state is State.DONE
            assert list(operation.seconds) == ["queued", "releasing", "growing"]
            assert w.engine.live == {0}
            w.check()

    run(test())


def test_a_slot_that_could_not_be_undone_is_used_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, slots=2) as w:
            w.engine.fail("progress")
            w.engine.fail("cancel")
            operation = await w.add("b", B)
            assert "not all could be undone" in operation.error
            assert set(w.engine.held) == {0, 1}  # prepared, not live
            assert (await w.add("a", A)).state is State.DONE
            w.check()

    run(test())


def test_a_retirement_that_fails_after_it_was_done_is_done(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await a_live(w)
            w.engine.fail("retire", "after")
            assert (await w.ended(await remove_a(w))).state is State.DONE
            w.check()

    run(test())


def test_a_retirement_that_turns_out_later_to_be_done(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await a_live(w)
            w.engine.fail("retire", "after")
            w.engine.fail("memory")
            operation = await w.ended(await remove_a(w))
            assert operation.error == (
                "injected before memory; m:full serves m, rows may be left over until the next "
                "operation"
            )
            assert w.registry.resolve("m:a") is None
            assert w.engine.live == {0}
            assert w.read_state().live == ("full",)

    run(test())


def test_nothing_interrupts_an_undoing(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            before = w.snapshot()
            w.engine.fail("golden")
            operation = await add_b(w)
            stops: list[asyncio.Task[None]] = []

            def look(method: str) -> None:
                if method == "retire":
                    w.control._runner.cancel(operation.id)
                    stops.append(asyncio.create_task(w.control.stop(5)))

            w.engine.on_call = look
            await w.ended(operation)
            assert operation.error.startswith("injected before golden; nothing has changed")
            await asyncio.gather(*stops)
            assert w.snapshot() == before

    run(test())


def test_the_switch_itself_cannot_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            operation = await add_b(w)
            loop = asyncio.get_running_loop()
            refused: list[str] = []

            def cancel() -> None:
                try:
                    w.control._runner.cancel(operation.id)
                except ConflictError as error:
                    refused.append(str(error))

            def write() -> None:
                if operation.state is State.SWITCHING:
                    loop.call_soon_threadsafe(cancel)

            before_writes(monkeypatch, write)
            await w.ended(operation)
            assert operation.state is State.DONE
            assert refused == [
                f"operation {operation.id} is switching, too late to cancel; roll back"
            ]

    run(test())


def test_keep_previous_rolls_back_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            await w.swap("a", keep=True)
            prepared = w.engine.calls["prepare"]
            full = w.registry.live["full"].served
            operation = await w.ended(await w.control.rollback(keep_previous=True))
            assert operation.state is State.DONE
            assert operation.kind == "rollback"
            assert list(operation.seconds) == [
                "queued",
                "canary",
                "switching",
                "releasing",
                "growing",
            ]
            assert w.engine.calls["prepare"] == prepared
            assert w.registry.resolve("m") == full
            assert w.registry.previous == "a"
            w.check()

    run(test())


def test_other_live_variants_stay(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            await w.add("b", B)
            served = w.registry.resolve("m:b")
            await w.swap("a")
            assert set(w.registry.live) == {"a", "b"}
            assert w.registry.resolve("m:b") == served
            w.check()

    run(test())


def test_canaries_are_asked_under_the_salt_of_their_publication(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as w:
            await w.add("a", A)
            await w.swap("a")
            await w.ended(await w.control.rollback())
            # start; add; swap before and after; roll back before and after.
            a = f"m:a@{A.digest}#2"
            base = "m:full@base#3"
            assert w.engine.salts == [None, a, a, a, base, base]

    run(test())
