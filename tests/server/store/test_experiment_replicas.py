"""Two replicas of one model on one database: what one measures or decides, both act upon."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from liveprune.server.experiments.measurements import Measurements
from liveprune.server.store.check import check
from tests.server.experiment_world import Clock, Site
from tests.server.live_world import run


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sites(url: str, tmp_path: Path, clock: Clock) -> Iterator[tuple[Site, Site]]:
    one, two = (Site(tmp_path, clock, name, url=url) for name in ("one", "two"))
    yield one, two
    for site in (one, two):
        site.store.close()


def test_both_measure_one_decides_both_act(sites: tuple[Site, Site], clock: Clock) -> None:
    async def test() -> None:
        one, two = sites
        await one.start()
        assert two.route("user-1") is None, "not before its next look"
        await two.look()
        # The first look decided on: it holds the lease.
        assert len(one.store.decisions.of("halve")) == 1
        arms = one.serve(60, loops={"pruned": 0.7})
        assert two.serve(60, loops={"pruned": 0.7}) == arms, "the same units, the same arms"
        two.serve(60, first=60, loops={"pruned": 0.7})
        await one.look()
        body = await one.service.get("halve")
        assert sum(arm.requests for arm in body.arms) == 60, "the other has not written yet"
        assert one.verdicts() == ["HOLD"], "one of them decides"
        await two.look()
        assert two.state() == "rolled_back"
        body = await one.service.get("halve")
        assert sum(arm.requests for arm in body.arms) == 180
        assert sum(arm.units for arm in body.arms) == 120, "each user once"
        assert two.route("user-1") is None
        assert one.route("user-1") is not None
        one.serve(5, first=500)
        await one.look()
        assert one.route("user-1") is None
        body = await two.service.get("halve")
        assert sum(arm.requests for arm in body.arms) == 185, "its last ones, too"

    run(test())


def test_another_decides_when_the_lease_has_run_out(sites: tuple[Site, Site], clock: Clock) -> None:
    async def test() -> None:
        one, two = sites
        await one.start()
        await one.look()
        one.serve(200, loops={"pruned": 0.7})
        await one.worker.refresh()  # written; then it dies
        clock.now += 30
        await two.look()
        assert two.state() == "running"
        clock.now += 1
        await two.look()
        assert two.state() == "rolled_back", "by what the dead one measured"

    run(test())


def test_an_operators_change_on_one_is_the_others(sites: tuple[Site, Site], clock: Clock) -> None:
    async def test() -> None:
        one, two = sites
        await one.start()
        await two.look()
        before = two.serve(100)
        await one.service.move("halve", {"full": 0.2, "pruned": 0.8})
        old = two.serve(100)
        assert old == before
        await two.look()
        after = two.serve(100)
        assert after == one.serve(100) != before
        # What was served by the old shares meanwhile is of the old phase.
        measured = two.live.measured("halve")
        assert measured is not None
        counts = [
            sum(cells["loop"].moments.count for cells in phase.cells.values())
            for phase in measured.phases
        ]
        assert counts == [200, 100]
        await one.service.stop("halve", "enough")
        await two.look()
        assert two.route("user-1") is None
        assert (await two.service.get("halve")).reason == "enough"

    run(test())


def test_each_swaps_to_the_winner(sites: tuple[Site, Site], clock: Clock) -> None:
    async def test() -> None:
        one, two = sites
        await one.start()
        await two.look()
        one.serve(300, gain=0.4)
        two.serve(300, first=300, gain=0.4)
        await one.worker.refresh()
        clock.now += 101
        assert await two.promoted() == ["e4"]
        assert one.control.calls == []
        assert await one.promoted() == ["e4"]
        for site in sites:
            assert await site.promoted() == ["e4"], "once"
        # After a restart, too; an operator may have swapped back meanwhile.
        again = Site(Path(one.store.files).parent, clock, "one", url=one.store.url)
        await again.worker.load()
        assert await again.promoted() == []
        again.store.close()

    run(test())


def test_scheduled_ones_begin_and_end_on_both(sites: tuple[Site, Site], clock: Clock) -> None:
    async def test() -> None:
        one, two = sites
        await one.start(start=clock.now + 10, end=clock.now + 60)
        for site in sites:
            await site.look()
            assert site.route("user-1") is None
        clock.now += 10
        for site in reversed(sites):
            await site.look()
        assert one.serve(50) == two.serve(50) != {}
        clock.now += 50
        for site in sites:
            await site.look()
            assert site.route("user-1") is None
        body = await one.service.get("halve")
        assert (body.state, sum(arm.requests for arm in body.arms)) == ("stopped", 100)

    run(test())


def _serve(folder: Path, url: str, clock: Clock) -> None:
    async def work() -> None:
        site = Site(folder, clock, "killed", url=url)
        await site.worker.load()
        for first in range(0, 10_000, 20):
            site.serve(20, first=first)
            clock.now += 1
            await site.look()

    run(work())


def test_killed_at_any_time_leaves_what_it_had_written(
    sites: tuple[Site, Site], url: str, tmp_path: Path, clock: Clock
) -> None:
    context, draw = multiprocessing.get_context("fork"), random.Random(2)

    async def start() -> None:
        await sites[0].start(minimum_units=10**6)

    run(start())
    seen = 0
    for number in range(6):
        child = context.Process(target=_serve, args=(tmp_path, url, clock))
        child.start()
        time.sleep(draw.uniform(0.1, 0.5) * 1.3**number)  # a slow machine gets there, too
        if child.pid is not None and child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert check(sites[0].store) == []
        form = sites[0].store.measurements.of("halve").get("killed")
        if form is not None:
            (phase,) = Measurements.from_json(form).phases
            count = sum(cells["loop"].moments.count for cells in phase.cells.values())
            assert count >= seen, "nothing that was written is lost"
            seen = count
    assert seen > 0
