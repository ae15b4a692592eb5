"""A control plane over a fake engine, with what its tests look at."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning import files
from liveprune.pruning.errors import StoreError
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_io import save_plan
from liveprune.server.control import Control
from liveprune.server.golden import Canaries
from liveprune.server.operations import Operation, State
from liveprune.server.state_folder import SavedState, StateFolder
from liveprune.server.store.servers import Servers
from liveprune.server.store.store import DATABASE
from tests.server.fake_engine import FakeEngine, fake_base, fake_plan

CANARIES = Canaries(((5, 6, 7), (9, 8)), "fake", tokens=4)
A = fake_plan([0, 1, 2, 3])
"""12 of 24 rows."""
B = fake_plan([2, 3, 4], top_k=2)
"""9 rows, 6 of them also A's."""
C = fake_plan([7], [6, 7], [0, 1, 2, 3, 4, 5, 6, 7])
"""11 rows, not uniform."""
FAST = dict.fromkeys(State, 10.0)


class World:
    """One server's control plane, over an engine that outlives nothing else."""

    def __init__(
        self,
        folder: Path,
        *,
        engine: FakeEngine | None = None,
        limits: Mapping[State, float] | None = None,
        memory_target: int | None = None,
        grace: float = 1.0,
        store: Mapping[str, Any] | None = None,
        **engine_options: Any,
    ) -> None:
        self.base = fake_base(folder / "base")
        self.engine = engine or FakeEngine(self.base, **engine_options)
        self.folder = StateFolder(folder / "state", self.base, **(store or {}))
        self.control = Control(
            "m",
            ["alias"],
            self.base,
            self.engine,
            self.folder,
            CANARIES,
            memory_target=memory_target,
            limits={**FAST, **(limits or {})},
            poll=0,
            grace=grace,
        )
        self.registry = self.control.directory
        self._plans = folder / "plans"

    def plan_file(self, plan: Plan) -> Path:
        path = self._plans / f"{plan.digest}.json"
        save_plan(plan, path)
        return path

    async def add(self, tag: str, plan: Plan) -> Operation:
        return await self.ended(await self.control.add(tag, self.plan_file(plan)))

    async def swap(self, tag: str, *, keep: bool = False) -> Operation:
        return await self.ended(await self.control.swap(tag, keep))

    async def ended(self, operation: Operation) -> Operation:
        """Wait for its end, by turns of the event loop."""
        await self.until(lambda: operation.state.ended)
        await asyncio.sleep(0)  # the callback that makes room for the next one
        return operation

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    def snapshot(self) -> dict[str, Any]:
        """Everything that an undone change must leave as it was."""
        registry = self.registry
        return {
            "live": {tag: p.served for tag, p in registry.live.items()},
            "slots": sorted((p.served.slot, p.phase.value) for p in registry.publications),
            "alias": registry.alias,
            "previous": registry.previous,
            "known": {tag: v.digest for tag, v in registry.known.items()},
            "engine slots": {n: s.plan and s.plan.digest for n, s in self.engine.held.items()},
            "engine live": self.engine.live,
            "rows": set(self.engine.resident),
            "blocks": self.engine.blocks,
            "files": self.files(),
        }

    def files(self) -> dict[str, Any]:
        """The state as a new server would read it, its count of epochs aside; the plans' files."""
        state = self.read_state()
        return {
            "variants": dict(state.variants),
            "live": set(state.live),
            "alias": state.alias,
            "previous": state.previous,
            "candidates": list((self.folder.path / "candidates").iterdir()),
            "plans": {path.stem for path in self.folder.store.plans.folder.iterdir()},
        }

    def read_state(self) -> SavedState:
        return self.folder._read()

    @property
    def tidy(self) -> bool:
        """No slot or row is held in vain, and the KV cache has all the rest of the target."""
        left = self.control._steps.memory_target - self.engine.total_bytes
        rest_is_used = 0 <= left < 500 or self.engine.blocks == 200
        all_live = {p.phase.value for p in self.registry.publications} == {"live"}
        return all_live and self.engine.resident == self.engine.needed and rest_is_used

    def check(self) -> None:
        """What holds between any two operations."""
        registry, engine = self.registry, self.engine
        assert engine.violations == []
        assert registry.alias in registry.live
        served = registry.resolve("m")
        assert served is not None
        assert served == registry.resolve("alias") == registry.resolve(f"m:{registry.alias}")
        assert engine.live == {p.served.slot for p in registry.publications}
        assert engine.live == set(engine.held)
        for publication in registry.live.values():
            held = engine.held[publication.served.slot]
            assert held.plan == publication.variant.plan
        assert engine.peak_bytes <= self.control._steps.memory_target
        assert self.tidy
        state = self.read_state()
        assert set(state.live) == set(registry.live)
        assert (state.alias, state.previous) == (registry.alias, registry.previous)
        plans = {path.stem for path in self.folder.store.plans.folder.iterdir()}
        assert plans == set(state.variants.values())


def saved_text(state: Path) -> str:
    """All that the store of a state folder says of variants and of what serves."""
    with closing(sqlite3.connect(state / DATABASE)) as connection:
        tables = ("SELECT state FROM servers", "SELECT tag, digest FROM variants ORDER BY tag")
        return str([connection.execute(table).fetchall() for table in tables])


def before_writes(monkeypatch: pytest.MonkeyPatch, hook: Callable[[], None]) -> None:
    """Have ``hook`` called before each write of plans, golden answers and the state.

    Its OSError is what the database makes of a full disk.
    """
    write, save = files.write_atomic, Servers.save

    def hooked_write(path: Path, data: bytes) -> None:
        hook()
        write(path, data)

    def hooked_save(self: Servers, *arguments: Any, **named: Any) -> None:
        try:
            hook()
        except OSError as error:
            raise StoreError(str(error)) from error
        save(self, *arguments, **named)

    for module in ("server.golden", "pruning.plan_io"):
        monkeypatch.setattr(f"liveprune.{module}.write_atomic", hooked_write)
    monkeypatch.setattr(Servers, "save", hooked_save)


@asynccontextmanager
async def world(
    folder: Path, *, resident: str | None = None, **options: Any
) -> AsyncIterator[World]:
    """A started one; stopped, so that its folder can be opened again, at the end."""
    made = World(folder, **options)
    try:
        assert await made.control.start(resident) == []
        yield made
    finally:
        await made.control.stop(1)


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; an event loop that hangs fails it."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())
