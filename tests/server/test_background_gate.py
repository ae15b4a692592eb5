"""The gate: users first, a share of the time, a pause where users are slowed down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from liveprune.pruning.errors import ConflictError
from liveprune.server.background_gate import PAUSES, BackgroundGate
from tests.server.live_world import run


class FakeTraffic:
    def __init__(self) -> None:
        self.in_flight = self.waiting = 0
        self.step: Callable[[float], None] = lambda seconds: None

    def listen(self, listener: Callable[[float], None]) -> None:
        self.step = listener


class World:
    """A gate with a clock of its own: every look at it takes a moment."""

    def __init__(self, share: float = 1.0, patience: float = 60.0) -> None:
        self.now = 100.0
        self.traffic = FakeTraffic()
        self.gate = BackgroundGate(self.traffic, patience=patience, clock=lambda: self.now)
        self.gate.share = share

    def quiet(self, seconds: float = 0.01) -> None:
        for _ in range(5):
            self.traffic.step(seconds)


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_an_idle_engine_takes_all_at_once() -> None:
    async def test() -> None:
        world = World()
        async with asyncio.timeout(5), world.gate.place(), world.gate.place(), world.gate.place():
            assert world.gate.inside == 3
        assert world.gate.inside == 0

    run(test())


def test_one_at_a_time_beside_users_and_none_before_their_first_token() -> None:
    async def test() -> None:
        world = World()
        world.traffic.in_flight = 2
        assert not world.gate.opens, "nobody knows yet how fast users' tokens come"
        world.quiet()
        world.traffic.waiting = 1
        assert not world.gate.opens
        world.traffic.waiting = 0
        assert world.gate.opens
        async with world.gate.place():
            assert not world.gate.opens
        assert world.gate.opens

    run(test())


def test_they_wait_in_order() -> None:
    async def test() -> None:
        world = World()
        world.traffic.in_flight = world.traffic.waiting = 1
        order: list[int] = []

        async def one(i: int) -> None:
            async with world.gate.place():
                order.append(i)

        tasks = [asyncio.create_task(one(i)) for i in range(5)]
        await asyncio.sleep(0.05)
        assert order == []
        world.traffic.in_flight = world.traffic.waiting = 0
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3, 4]

    run(test())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_no_more_than_the_share_of_the_time(share: float) -> None:
    async def test() -> None:
        world = World(share)
        used = 0.0
        begun = world.now
        while world.now < begun + 200:
            if world.gate.opens:
                async with world.gate.place():
                    world.now += 0.3
                    used += 0.3
            else:
                world.now += 0.01
        passed = world.now - begun
        assert world.gate.busy_seconds == pytest.approx(used)
        # One second may have been saved up, one request begun with the last of it.
        assert share * passed - 0.1 <= used <= share * passed + 1.0 + 0.3

    run(test())


def test_overlapping_requests_count_once() -> None:
    async def test() -> None:
        world = World()
        async with world.gate.place():
            world.now += 1
            async with world.gate.place():
                world.now += 2
            world.now += 4
        world.now += 8
        assert not world.gate.inside
        assert world.gate.busy_seconds == 7

    run(test())


def test_it_pauses_longer_each_time_users_are_slowed_down() -> None:
    async def test() -> None:
        world = World()
        world.traffic.in_flight = 1
        world.quiet(0.010)
        pauses = []
        for _ in range(9):
            async with world.gate.place():
                for _ in range(3):
                    world.traffic.step(0.013)
            begun = world.now
            while not world.gate.opens:
                world.now += 0.01
            pauses.append(world.now - begun)
        first, longest = PAUSES
        expected = [min(first * 2**i, longest) for i in range(9)]
        assert pauses == pytest.approx(expected, abs=0.011)
        async with world.gate.place():
            for _ in range(3):
                world.traffic.step(0.011)
        assert world.gate.opens, "a tenth slower is no reason"
        async with world.gate.place():
            for _ in range(9):
                world.traffic.step(0.015)
        begun = world.now
        while not world.gate.opens:
            world.now += 0.01
        assert world.now - begun <= first + 0.011, "and the pauses start from the shortest again"

    run(test())


def test_a_pause_is_for_users_only() -> None:
    async def test() -> None:
        world = World()
        world.traffic.in_flight = 1
        world.quiet(0.010)
        async with world.gate.place():
            for _ in range(3):
                world.traffic.step(0.020)
        assert not world.gate.opens
        world.traffic.in_flight = 0
        assert world.gate.opens, "they are gone, so nobody is slowed down"
        world.traffic.in_flight = 1
        assert not world.gate.opens, "and when they are back it holds again"

    run(test())


def test_more_users_are_not_taken_for_a_slowdown_for_long() -> None:
    async def test() -> None:
        world = World()
        world.traffic.in_flight = 1
        world.quiet(0.010)
        async with world.gate.place():
            for _ in range(3):
                world.traffic.step(0.030)
        assert not world.gate.opens
        for _ in range(30):
            world.traffic.step(0.030)  # as slow without candidates
        world.now += 1
        async with world.gate.place():
            for _ in range(3):
                world.traffic.step(0.031)
        assert world.gate.opens

    run(test())


def test_who_waits_too_long_is_sent_away() -> None:
    async def test() -> None:
        world = World(patience=5)
        world.traffic.in_flight = world.traffic.waiting = 1
        waiting = asyncio.create_task(world.gate.place().__aenter__())
        await turns()
        world.now += 6
        with pytest.raises(ConflictError, match="no place for 5 s"):
            await waiting
        world.traffic.in_flight = world.traffic.waiting = 0
        async with world.gate.place():
            pass

    run(test())


def test_a_cancelled_one_leaves_its_place() -> None:
    async def test() -> None:
        world = World()

        async def hold() -> None:
            async with world.gate.place():
                await asyncio.get_running_loop().create_future()

        task = asyncio.create_task(hold())
        await turns()
        assert world.gate.inside == 1
        task.cancel()
        await asyncio.wait({task})
        assert world.gate.inside == 0

    run(test())
