"""Random operations under traffic, with faults, cancellations and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from liveprune.patches.live_types import KVStatus
from liveprune.pruning.errors import ConflictError, VariantError
from liveprune.server.operations import Operation, State
from tests.server.fake_engine import FakeEngine, fake_base, fake_plan
from tests.server.live_world import A, B, C, World, run, world

PLANS = [A, B, C, fake_plan([0, 7]), fake_plan(range(8), [1], [2, 3])]
KINDS = ["add", "add", "swap", "swap", "swap", "rollback", "remove"]
FAULTY = ["prepare", "progress", "publish", "golden", "resize_kv", "retire", "release", "memory"]
KV = KVStatus(blocks=40, min_blocks=4, max_blocks=200, block_bytes=500)
SLOTS = 5


class Chaos:
    """One seed's choices over one world."""

    def __init__(self, w: World, choose: random.Random) -> None:
        self.w = w
        self.choose = choose

    async def step(self) -> Operation | None:
        """One operation from request to end, and what must hold after it."""
        w, choose = self.w, self.choose
        if choose.random() < 0.2:
            when = choose.choice(["before", "after"])
            w.engine.fail(choose.choice(FAULTY), when, first=choose.randrange(1, 6))
        tidy = w.tidy
        before = w.snapshot()
        streams = [asyncio.create_task(self.stream()) for _ in range(choose.randrange(4))]
        operation = await self.change()
        if operation is not None:
            if choose.random() < 0.1:
                for _ in range(choose.randrange(30)):
                    await asyncio.sleep(0)
                with contextlib.suppress(ConflictError):
                    await w.control.cancel(operation.id)
            await w.ended(operation)
        await asyncio.gather(*streams)
        w.engine.heal()
        assert w.engine.violations == []
        if operation is None or self.undone(operation):
            if tidy:  # else it made up for what an operation before it had left undone
                assert w.snapshot() == before
        elif operation.state is not State.DONE:
            return operation  # the next operation tidies up
        grown = operation is not None and State.GROWING.value in operation.seconds
        if tidy or grown:
            w.check()
        return operation

    async def change(self) -> Operation | None:
        w, choose = self.w, self.choose
        kind, tag = choose.choice(KINDS), choose.choice(sorted(w.registry.known))
        with contextlib.suppress(ConflictError, VariantError):
            if kind == "add" and choose.random() < 0.5:
                plan = w.plan_file(choose.choice(PLANS))
                return await w.control.add(f"v{choose.randrange(5)}", plan)
            if kind == "add":
                return await w.control.add(tag)
            if kind == "swap":
                return await w.control.swap(tag, choose.random() < 0.3)
            if kind == "rollback":
                return await w.control.rollback(choose.random() < 0.3)
            return await w.control.remove(tag, forget=tag != "full" and choose.random() < 0.5)
        return None

    async def stream(self) -> None:
        """A request that begins on whatever its name means, and ends on the same plan."""
        w, choose = self.w, self.choose
        names = ["m", "alias", *(f"m:{tag}" for tag in w.registry.known)]
        served = w.registry.resolve(choose.choice(names))
        if served is None:
            return
        w.registry.pin(served)
        w.engine.busy[served.slot] += 1
        plan = w.engine.held[served.slot].plan
        for _ in range(choose.randrange(40)):
            await asyncio.sleep(0)
            assert w.engine.held[served.slot].plan is plan
            assert w.engine.held[served.slot].live
        w.engine.busy[served.slot] -= 1
        w.registry.unpin(served)

    def undone(self, operation: Operation) -> bool:
        said = (operation.error, *operation.notes)
        return any("nothing has changed" in text or "before it began" in text for text in said)


@pytest.mark.parametrize("seed", range(4))
def test_invariants_hold(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    choose = random.Random(seed)

    async def test() -> None:
        ends: Counter[str] = Counter()
        for _ in range(4):
            engine = FakeEngine(fake_base(tmp_path / "base"), slots=SLOTS, kv=KV)
            async with world(tmp_path, engine=engine) as w:
                w.check()
                chaos = Chaos(w, choose)
                for _ in range(20):
                    operation = await chaos.step()
                    ends["refused" if operation is None else operation.state.value] += 1
                live = {tag: p.variant.digest for tag, p in w.registry.live.items()}
                names = w.registry.alias, w.registry.previous
            async with world(tmp_path, slots=SLOTS, kv=KV) as w:
                assert {tag: p.variant.digest for tag, p in w.registry.live.items()} == live
                assert (w.registry.alias, w.registry.previous) == names
                w.check()
        assert ends["done"] > 30

    run(test())
