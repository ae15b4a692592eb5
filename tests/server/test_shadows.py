from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from liveprune.patches.live_types import Served
from liveprune.patches.request_meter import Generation, Meter
from liveprune.pruning.errors import ConflictError, EngineError
from liveprune.server.experiments.live import Assignment
from liveprune.server.measuring import Measured
from liveprune.server.shadows import AT_ONCE, WAITING, Shadows
from tests.server.live_world import A, World, run, world
from tests.server.test_fidelity import assignment, cell, experiments, settle

SHADOW = assignment("two", "full", shadow="a")


def generation(prompt: Sequence[int] = (1, 2), **changes: Any) -> Generation:
    fields: dict[str, Any] = {"request": "r", "prompt": prompt, "prompt_tokens": len(prompt)}
    fields |= {"tokens": (3, 4, 5), "text": "x", "finish": "length", "first": 1.0, "last": 2.0}
    return Generation(**{**fields, "queue_seconds": 0.5, "sampling": None, **changes})


def measured(assigned: Assignment | None = SHADOW, *generations: Generation) -> Measured:
    served = Served("m:full", 0, None)
    return Measured(served, assigned, "ok", {}, (), generations or (generation(),), "id")


class Copies:
    """The engine as shadows see it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, tuple[int, ...]]] = []
        self.pinned: list[int] = []
        self.error: Exception | None = None
        self.found: tuple[Generation, ...] = (generation((1, 2), tokens=(7, 8, 9)),)
        self.held = asyncio.Event()
        self.held.set()
        self.at_once = self.most = 0
        self.registry: Any = None
        monkeypatch.setattr(Meter, "generations", lambda _: self.found)
        monkeypatch.setattr(Meter, "first", property(lambda _: None))

    async def repeat(self, served: Served, generation: Generation, meter: Meter) -> None:
        self.asked.append((served.name, tuple(generation.prompt)))
        live = self.registry.live["a"]
        self.pinned.append(self.registry.in_flight(live))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await self.held.wait()
        finally:
            self.at_once -= 1
        if self.error is not None:
            raise self.error


def test(body: Callable[[World, Copies, Any, Shadows, list[Any]], Any], path: Path) -> None:
    """Run a test body in a world with a variant ``a`` and an experiment."""

    async def inside() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            async with world(path) as w:
                await w.add("a", A)
                copies, found, shown = Copies(monkeypatch), experiments(), []
                copies.registry = w.registry
                shadows = Shadows(
                    copies.repeat,
                    w.registry,
                    found,
                    closed=lambda: getattr(w, "closed", False),
                    answered=lambda *what: shown.append(what),
                )
                await body(w, copies, found, shadows, shown)

    run(inside())


test.__test__ = False  # type: ignore[attr-defined]


def test_a_copy_is_measured_for_its_arm(tmp_path: Path) -> None:
    async def body(w: World, copies: Copies, found: Any, shadows: Shadows, shown: Any) -> None:
        async with shadows.running():
            shadows.offer(measured())
            await settle(lambda: cell(found, "two", "error")[0] == 1)
        assert copies.asked == [("m:a", (1, 2))]
        assert copies.pinned == [1]
        assert w.registry.in_flight(w.registry.live["a"]) == 0
        assert cell(found, "two", "error") == (1, 0.0)
        assert cell(found, "two", "output_tokens") == (1, 3.0)
        assert cell(found, "two", "length") == (1, 1.0)
        assert cell(found, "one", "error")[0] == 0
        assert shown == [(SHADOW, (1, 2), (7, 8, 9))]

    test(body, tmp_path)


def test_only_shadows_are_copied(tmp_path: Path) -> None:
    async def body(w: World, copies: Copies, found: Any, shadows: Shadows, shown: Any) -> None:
        async with shadows.running():
            for assigned in (
                None,
                assignment("two", "a"),
                assignment("two", "full", shadow="a", counted=False),
            ):
                shadows.offer(measured(assigned))
            shadows.offer(measured(SHADOW, generation(())))
            shadows.offer(measured(SHADOW, generation((9,)), generation((8,))))
            await settle(lambda: cell(found, "two", "error")[0] == 1)
        assert copies.asked == [("m:a", (9,))]

    test(body, tmp_path)


@pytest.mark.parametrize("broken", [False, True])
def test_a_copy_that_fails_is_an_error_of_its_arm(tmp_path: Path, broken: bool) -> None:
    async def body(w: World, copies: Copies, found: Any, shadows: Shadows, shown: Any) -> None:
        if broken:
            copies.found = (generation(finish="error"),)
        else:
            copies.error, copies.found = EngineError("no answer"), ()
        async with shadows.running():
            shadows.offer(measured())
            await settle(lambda: cell(found, "two", "error")[0] == 1)
            assert cell(found, "two", "error") == (1, 1.0)
            assert shown == []
            assert w.registry.in_flight(w.registry.live["a"]) == 0
            copies.error, copies.found = None, (generation(),)
            shadows.offer(measured())
            await settle(lambda: cell(found, "two", "error") == (2, 0.5))

    test(body, tmp_path)


def test_one_that_takes_too_long_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liveprune.server.shadows.LONGEST_SECONDS", 0.01)

    async def body(w: World, copies: Copies, found: Any, shadows: Shadows, shown: Any) -> None:
        copies.held.clear()
        copies.found = (generation(finish=None),)
        async with shadows.running():
            shadows.offer(measured())
            await settle(lambda: cell(found, "two", "error") == (1, 1.0))

    test(body, tmp_path)


def test_without_a_place_or_a_variant_nothing_is_said(tmp_path: Path) -> None:
    async def body(w: World, copies: Copies, found: Any, shadows: Shadows, shown: Any) -> None:
        copies.error = ConflictError("no place")
        async with shadows.running():
            shadows.offer(measured())
            shadows.offer(measured(assignment("two", "full", shadow="gone")))
            await settle(lambda: len(copies.asked) == 1 and not shadows._waiting)
            await asyncio.sleep(0.01)
            assert cell(found, "two", "error")[0] == 0
            w.closed = True  # type: ignore[attr-defined]
            copies.error = None
            shadows.offer(measured())
            await asyncio.sleep(0.01)
            assert len(copies.asked) == 1, "background work is off"

    test(body, tmp_path)


def test_few_at_once_and_a_bounded_wait(tmp_path: Path) -> None:
    async def body(w: World, copies: Copies, found: Any, shadows: Shadows, shown: Any) -> None:
        copies.held.clear()
        async with shadows.running():
            for number in range(AT_ONCE):
                shadows.offer(measured(SHADOW, generation((100 + number,))))
            await settle(lambda: len(copies.asked) == AT_ONCE)
            for number in range(WAITING + 1):
                shadows.offer(measured(SHADOW, generation((number,))))
            copies.held.set()
            await settle(lambda: cell(found, "two", "error")[0] == AT_ONCE + WAITING)
        assert copies.most == AT_ONCE
        assert [prompt[0] for _, prompt in copies.asked[AT_ONCE:]] == list(range(1, WAITING + 1))

    test(body, tmp_path)
