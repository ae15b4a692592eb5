from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.checkpoint.inspect import inspect
from liveprune.pruning.checkpoint.verify import verify_checkpoint
from liveprune.pruning.errors import (
    CheckpointError,
    ConflictError,
    IncompatibleEnvironmentError,
    PlanError,
    VariantError,
)
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_io import save_plan
from liveprune.server import rebuild_checkpoints
from liveprune.server.control_plane import ControlPlane
from liveprune.server.operations import Operation, State
from liveprune.server.rebuild import RebuildControl
from liveprune.server.rebuild_restart import VARIABLE, next_model
from liveprune.server.rebuild_state import RebuildFolder
from tests.checkpoints import make_plan, merge_plan

CHILD = Path(__file__).with_name("rebuild_server.py")
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class World:
    """A server that is not there: what it answers, and how often it was told to stop."""

    def __init__(self, base: Path, path: Path) -> None:
        self.base = base
        self.state = path / "state"
        self.plans = path
        self.up = True
        self.stops = 0
        self.stop_error: Exception | None = None
        self.recorded: list[tuple[str, State]] = []

    def plan(self, name: str, plan: Plan | None = None) -> Path:
        path = self.plans / f"{name}.json"
        save_plan(plan or make_plan(self.base, [(0, 3, 4, 6)], top_k=1), path)
        return path

    async def answers(self) -> bool:
        return self.up

    def stop(self) -> None:
        self.stops += 1
        if self.stop_error is not None:
            raise self.stop_error

    def folder(self) -> RebuildFolder:
        return RebuildFolder(self.state, self.base)

    @contextlib.asynccontextmanager
    async def control(self, folder: RebuildFolder | None = None) -> AsyncIterator[RebuildControl]:
        """Started, and answering unless the server is down."""
        control = RebuildControl(
            folder or self.folder(),
            "m",
            reason="quantised weights (fp8)",
            answers=self.answers,
            stop_server=self.stop,
            on_end=lambda operation: self.recorded.append((operation.kind, operation.state)),
            poll=0.01,
        )
        await control.start()
        if self.up:
            await until(lambda: control._settled)
        try:
            yield control
        finally:
            await control.stop()

    @contextlib.asynccontextmanager
    async def restarted(self) -> AsyncIterator[tuple[RebuildControl, Path]]:
        """As in the process after the swap; with the checkpoint that it serves."""
        folder = self.folder()
        os.environ[VARIABLE] = str((folder.state.operation or {})["id"])
        model = next_model(folder)
        async with self.control(folder) as control:
            yield control, model


@pytest.fixture
def world(tiny_model: Callable[..., Path], tmp_path: Path) -> World:
    return World(tiny_model("mixtral"), tmp_path)


class SlowWorker:
    """Writes a checkpoint when told to."""

    go = threading.Event()
    killed = threading.Event()

    def __init__(self, model: Path, plan: Plan, output: Path) -> None:
        self.output = output

    def run(self, progress: Callable[[int, int], None]) -> None:
        progress(5, 10)
        self.go.wait(60)
        if self.killed.is_set():
            raise CheckpointError("killed")
        self.output.mkdir(parents=True)
        (self.output / "weights").write_bytes(b"0123456789")

    def kill(self) -> None:
        self.killed.set()
        self.go.set()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[SlowWorker]:
    SlowWorker.go, SlowWorker.killed = threading.Event(), threading.Event()
    monkeypatch.setattr(rebuild_checkpoints, "CheckpointWorker", SlowWorker)
    return SlowWorker


@pytest.fixture
def quick(slow: type[SlowWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are empty folders, and pass for whole ones."""
    slow.go.set()
    monkeypatch.setattr("liveprune.server.rebuild.verify_checkpoint", lambda _: None)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not holds():  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0.001)


async def ended(control: RebuildControl, asked: Operation) -> Operation:
    """What the operation is in the end; after a restart that is another object."""

    def now() -> Operation:
        return control.operation(asked.id) or asked

    await until(lambda: now().finished is not None)
    return now()


async def in_state(operation: Operation, state: State) -> None:
    await until(lambda: operation.state is state)


async def added(control: RebuildControl, world: World, tag: str) -> Operation:
    return await ended(control, await control.add(tag, world.plan(tag)))


async def test_an_added_variant_is_a_checkpoint(world: World) -> None:
    plan = make_plan(world.base, [(0, 3, 4, 6)], top_k=1)
    async with world.control() as control:
        plane: ControlPlane = control
        before = await plane.status()
        operation = await ended(control, await plane.add("small", world.plan("small", plan)))
        (full, small) = await plane.variants()
    assert operation.state is State.DONE
    assert operation.bytes_done == operation.bytes_total > 0
    assert operation.notes[0] == (
        "rebuild mode: live variants cannot work with quantised weights (fp8)"
    )
    assert "on disk; serving it takes a swap, which restarts the server" in operation.notes[1]
    output = world.state / "rebuilt" / plan.digest
    verify_checkpoint(output)
    assert inspect(output).digest == plan.digest
    sizes = inspect(world.base)
    assert before.expert_bytes == sizes.expert_bytes
    assert before.expert_bytes + before.other_weight_bytes == sizes.total_bytes
    assert (before.alias, before.previous, before.ready) == ("m:full", None, True)
    assert (full.name, full.state, full.is_alias, full.digest) == ("m:full", "live", True, None)
    assert full.row_bytes == sizes.expert_bytes
    assert (small.name, small.state, small.is_alias) == ("m:small", "standby", False)
    assert (small.digest, small.row_bytes) == (plan.digest, 0)
    assert small.experts == {"min": 4, "max": 4, "total": 12}
    assert small.top_k == {"min": 1, "max": 1}


async def test_the_layers_of_a_checkpoint(world: World) -> None:
    async with world.control() as control:
        await ended(control, await control.add("e4", world.plan("p")))
        assert {(x.kept, x.remaining, x.top_k) for x in await control.layers("e4")} == {
            ((0, 3, 4, 6), 4, 1)
        }
        assert {(x.remaining, x.top_k) for x in await control.layers("full")} == {(8, 2)}
        with pytest.raises(VariantError):
            await control.layers("nothing")


async def test_the_stated_cost_is_about_right(world: World) -> None:
    plan = merge_plan(world.base, 3, router_map=True)
    async with world.control() as control:
        stated = control._checkpoints.cost(plan)
        await ended(control, await control.add("merged", world.plan("merged", plan)))
        written = inspect(world.state / "rebuilt" / plan.digest).total_bytes
        assert written == pytest.approx(stated, rel=0.02)
        assert control._folder.state.variants["merged"].bytes > (written or 0)


async def test_a_plan_that_does_not_fit_is_refused_at_once(
    world: World, tiny_model: Callable[..., Path]
) -> None:
    other = make_plan(tiny_model("mixtral", num_local_experts=4), [(0, 1)])
    async with world.control() as control:
        with pytest.raises(PlanError, match="is for 4 experts, the model has 8"):
            await control.add("small", world.plan("other", other))
        with pytest.raises(VariantError, match="reserved"):
            await control.add("full", world.plan("small"))
        assert control.operations() == []


async def test_what_the_worker_fails_with_is_the_operations_error(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(SlowWorker):
        def run(self, progress: Callable[[int, int], None]) -> None:
            raise CheckpointError("no room\non the disk")

    monkeypatch.setattr(rebuild_checkpoints, "CheckpointWorker", Failing)
    async with world.control() as control:
        operation = await added(control, world, "small")
        assert (operation.state, operation.error) == (State.FAILED, "no room on the disk")
        assert [view.tag for view in await control.variants()] == ["full"]


async def test_an_add_can_be_cancelled(world: World, slow: type[SlowWorker]) -> None:
    async with world.control() as control:
        operation = await control.add("small", world.plan("small"))
        await in_state(operation, State.FILLING)
        await until(lambda: operation.bytes_done > 0)
        assert (operation.bytes_done, operation.bytes_total) == (5, 10)
        assert [view.state for view in await control.variants()] == ["live", "preparing"]
        with pytest.raises(ConflictError, match="add of m:small is under way"):
            await control.swap("full")
        assert (await control.cancel(operation.id)).state is State.CANCELLED
        assert slow.killed.is_set()
        with pytest.raises(ConflictError, match="has ended: cancelled"):
            await control.cancel(operation.id)
        assert [view.tag for view in await control.variants()] == ["full"]
        assert world.folder().state.variants == {}


async def test_a_stopping_server_stops_writing(world: World, slow: type[SlowWorker]) -> None:
    async with world.control() as control:
        operation = await control.add("small", world.plan("small"))
        await in_state(operation, State.FILLING)
    assert slow.killed.is_set()
    assert operation.state is State.FAILED
    assert operation.error == "interrupted: the server stopped"


@pytest.mark.usefixtures("quick")
async def test_a_tag_keeps_its_plan(world: World) -> None:
    async with world.control() as control:
        await added(control, world, "small")
        other = world.plan("other", make_plan(world.base, [(1, 2)]))
        with pytest.raises(VariantError, match=r"m:small: has the plan .*remove it first"):
            await control.add("small", other)
        again = await added(control, world, "small")
        assert again.state is State.DONE
        assert again.bytes_done == 0  # nothing was written


@pytest.mark.usefixtures("quick")
async def test_idempotency_keys(world: World) -> None:
    async with world.control() as control:
        plan = world.plan("small")
        first = await control.add("small", plan, idempotency_key="a")
        assert await control.add("small", plan, idempotency_key="a") is first
        await ended(control, first)
        assert await control.add("small", plan, idempotency_key="a") is first
        with pytest.raises(ConflictError, match="idempotency key 'a': came with"):
            await control.swap("small", idempotency_key="a")
        assert control.operations() == [first]


async def test_plans_cannot_be_tried_out(world: World) -> None:
    async with world.control() as control:
        with pytest.raises(
            IncompatibleEnvironmentError, match=r"rebuild mode: .* cannot work with"
        ):
            _ = control.candidates
        assert (await control.status()).fingerprint == ""


@pytest.mark.usefixtures("quick")
async def test_a_swap_goes_over_the_restart(world: World) -> None:
    async with world.control() as control:
        await added(control, world, "small")
        asked = await control.swap("small", idempotency_key="a")
        await in_state(asked, State.SWITCHING)
        await until(lambda: world.stops == 1)
        status = await control.status()
        assert (status.ready, status.alias) == (False, "m:full")
        assert status.operation is asked
        assert status.variants[0].state == "draining"
        with pytest.raises(ConflictError, match="is switching, too late to cancel"):
            await control.cancel(asked.id)
        with pytest.raises(ConflictError, match="under way"):
            await control.rollback()
    assert "--shutdown-timeout" in asked.notes[1]
    assert not asked.state.ended
    assert world.recorded == [("add", State.DONE)]

    world.up = False
    async with world.restarted() as (control, model):
        assert model == control._folder.model("small")
        running = control.operation(asked.id)
        assert running is not None
        assert running.state is State.SWITCHING
        assert not (await control.status()).ready
        with pytest.raises(ConflictError, match="under way"):
            await control.swap("full")
        with pytest.raises(ConflictError, match="too late"):
            await control.cancel(asked.id)
        world.up = True
        done = await ended(control, asked)
        assert (done.state, done.kind, done.variant) == (State.DONE, "swap", "m:small")
        assert list(done.seconds) == ["queued", "switching"]
        assert await control.swap("small", idempotency_key="a") is done
        status = await control.status()
        assert (status.ready, status.alias, status.previous) == (True, "m:small", "m:full")
        assert status.operation is None
        assert [view.state for view in status.variants] == ["standby", "live"]

        back = await control.rollback()
        await in_state(back, State.SWITCHING)
    async with world.restarted() as (control, model):
        assert model == world.base
        assert (await ended(control, back)).kind == "rollback"
        assert (await control.status()).previous == "m:small"
    assert world.recorded[1:] == [("swap", State.DONE), ("rollback", State.DONE)]
    async with world.control() as control:
        assert control.operations() == []  # a later start, which no swap was the reason of


@pytest.mark.usefixtures("quick")
async def test_what_cannot_be_swapped_to(world: World) -> None:
    async with world.control() as control:
        with pytest.raises(VariantError, match="'none' is unknown"):
            await control.swap("none")
        with pytest.raises(ConflictError, match="no swap to roll back"):
            await control.rollback()
        same = await ended(control, await control.swap("full"))
        assert (same.state, world.stops) == (State.DONE, 0)


@pytest.mark.usefixtures("quick")
async def test_a_swap_can_be_cancelled_before_it_stops_the_server(world: World) -> None:
    async with world.control() as control:
        await added(control, world, "small")
        operation = await control.swap("small")
        assert (await control.cancel(operation.id)).state is State.CANCELLED
        with pytest.raises(VariantError, match="operation 'none' is unknown"):
            await control.cancel("none")
        assert (await control.status()).operation is None
    assert world.stops == 0
    assert world.folder().state.wanted is None


async def test_a_damaged_checkpoint_does_not_stop_the_server(
    world: World, slow: type[SlowWorker]
) -> None:
    slow.go.set()  # what it writes is no checkpoint
    async with world.control() as control:
        await added(control, world, "small")
        operation = await ended(control, await control.swap("small"))
        assert operation.state is State.FAILED
        assert "config.json" in operation.error
        assert world.stops == 0
        assert (await control.status()).ready
        assert world.folder().state.wanted is None


@pytest.mark.usefixtures("quick")
async def test_a_server_that_cannot_be_stopped_serves_on(world: World) -> None:
    async with world.control() as control:
        await added(control, world, "small")
        world.stop_error = OSError("no such process")
        operation = await ended(control, await control.swap("small"))
        assert (operation.state, operation.error) == (State.FAILED, "OSError: no such process")
        assert world.folder().state.wanted is None
        assert (await control.status()).ready


@pytest.mark.usefixtures("quick")
async def test_remove_deletes_the_checkpoint(world: World) -> None:
    async with world.control() as control:
        await added(control, world, "small")
        await added(control, world, "same")
        path = control._folder.model("small")
        shared = await ended(control, await control.remove("small"))
        assert path.is_dir()
        assert (shared.state, shared.freed_bytes) == (State.DONE, 0)
        operation = await ended(control, await control.remove("same", idempotency_key="a"))
        assert operation.freed_bytes == 10  # the one file
        assert not path.exists()
        assert await control.remove("same", idempotency_key="a") is operation
        with pytest.raises(VariantError, match="'same' is unknown"):
            await control.remove("same")
        with pytest.raises(VariantError, match="never removed"):
            await control.remove("full")


@pytest.mark.usefixtures("quick")
async def test_what_serves_is_not_removed(world: World) -> None:
    async with world.control() as control:
        await added(control, world, "small")
        await in_state(await control.swap("small"), State.SWITCHING)
    async with world.restarted() as (control, _):
        with pytest.raises(ConflictError, match="serves 'm'; swap to another variant first"):
            await control.remove("small")
        await added(control, world, "other")


@pytest.mark.usefixtures("quick")
async def test_a_start_deletes_what_no_variant_has(world: World) -> None:
    async with world.control() as control:
        await added(control, world, "small")
        kept = control._folder.model("small")
    for name in ("." + "1" * 32 + ".partial", "1" * 32):
        (kept.parent / name).mkdir()
    async with world.control() as control:
        assert list(kept.parent.iterdir()) == [kept]
        assert [view.tag for view in await control.variants()] == ["full", "small"]


async def test_nothing_changes_before_the_server_answers(world: World) -> None:
    world.up = False
    async with world.control() as control:
        with pytest.raises(ConflictError, match="does not answer requests yet"):
            await control.add("small", world.plan("small"))
        assert not (await control.status()).ready


async def test_a_full_disk_at_the_first_answer_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liveprune.server.rebuild.RETRY_SECONDS", 0.01)
    folder, tries = world.folder(), 0
    update = folder.update

    def failing(change: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise OSError("no space left on device")
        return update(change)

    monkeypatch.setattr(folder, "update", failing)
    async with world.control(folder):
        assert tries == 2
        assert folder.state_file.is_file()


def test_a_real_process_swaps_itself(world: World, tmp_path: Path) -> None:
    """``rebuild_server`` adds a variant, swaps to it, and tells what it is afterwards."""
    plan = world.plan("small")
    command = [sys.executable, str(CHILD), str(world.state), str(world.base), str(plan)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["model"] == str(world.base)
    assert second["model"] == str(world.folder().model("small"))
    assert first["pid"] == second["pid"]
    assert second["operation"]["id"] == first["operation"]["id"]
    assert (first["operation"]["state"], second["operation"]["state"]) == ("switching", "done")
    assert second["operation"]["seconds"]["switching"] > 0
