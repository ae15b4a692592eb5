"""Whole experiments through worker and service, with a clock that is set; one replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.errors import ConflictError, ExperimentError, StoreError, VariantError
from liveprune.server.experiments.decision import replay
from liveprune.server.operations import State
from liveprune.server.store import schema
from liveprune.server.store.experiment_rows import UnknownExperimentError
from liveprune.server.store.measurements import MeasurementRows
from tests.server.experiment_world import Clock, Site, definition, experiment
from tests.server.live_world import run

ALL = 1_000_000


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def site(tmp_path: Path, clock: Clock) -> Iterator[Site]:
    made = Site(tmp_path, clock)
    yield made
    made.store.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(50):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def test_a_bad_arm_is_rolled_back(site: Site, clock: Clock, caplog: Any) -> None:
    async def test() -> None:
        await site.start()
        assert site.live.measured("halve") is not None, "routed by at once"
        site.serve(300, loops={"pruned": 0.6})
        clock.now += 10
        await site.look()
        assert site.shares() == {"full": ALL, "pruned": 0}
        assert site.state() == "rolled_back"
        assert site.route("user-1") is None, "gone here at once"
        found = await site.service.get("halve")
        assert (found.state, found.ended, found.phase) == ("rolled_back", clock.now, 1)
        assert found.reason is not None
        assert found.reason.startswith("loop: worse")
        assert found.decision is not None
        assert (found.decision.verdict, found.decision.arm) == ("ROLLBACK", "pruned")
        assert site.control.calls == [], "no swap"

    with caplog.at_level(logging.INFO, "liveprune"):
        run(test())
    told = [x.getMessage() for x in caplog.records if "ROLLBACK" in x.getMessage()]
    assert len(told) == 1
    assert "halve: ROLLBACK pruned" in told[0]


def test_a_good_arm_is_ramped_and_shipped(site: Site, clock: Clock) -> None:
    async def test() -> None:
        arms = [
            {"name": "full", "variant": "full", "weight": 0.7},
            {"name": "pruned", "variant": "e4", "weight": 0.3},
        ]
        await site.start(arms=arms, ramp=[0.5, 0.6])
        before = site.serve(400, gain=0.4)
        clock.now += 101
        await site.look()
        assert site.shares() == {"full": 500_000, "pruned": 500_000}
        after = site.serve(400, gain=0.4)
        assert all(after[user] == "pruned" for user, arm in before.items() if arm == "pruned")
        clock.now += 50
        await site.look()
        assert site.shares()["pruned"] == 500_000, "each phase has its minimum time"
        clock.now += 51
        await site.look()
        assert site.shares()["pruned"] == 600_000
        site.serve(400, gain=0.4)
        clock.now += 10
        assert await site.promoted() == ["e4"], "after the last step, at once"
        assert site.state() == "shipped"
        assert await site.promoted() == ["e4"], "once"
        verdicts = [x.decision for x in site.store.decisions.of("halve")]
        actions = [tuple(x["actions"]) for x in verdicts if x["actions"]]
        assert actions[-1] == ("notify", "promote")
        assert [x[-1] for x in actions if x != ("notify",)] == ["ramp", "ramp", "promote"]
        found = await site.service.get("halve")
        assert found.reason is not None
        assert "still swaps" not in found.reason
        # What is on record gives the same decision once more.
        for row in site.store.decisions.of("halve"):
            assert replay(row.record).to_json() == {
                **row.decision,
                "reasons": tuple(row.decision["reasons"]),
                "actions": tuple(row.decision["actions"]),
                "withheld": tuple(row.decision["withheld"]),
                "findings": tuple(row.decision["findings"]),
            }

    run(test())


def test_an_arm_that_loses_units_is_invalid(site: Site, clock: Clock, caplog: Any) -> None:
    async def test() -> None:
        await site.start()
        await site.look()
        site.serve(600, gain=0.4, lost=lambda x: x.arm == "pruned" and x.unit % 2 == 0)
        units = site.live.measured("halve").phases[0].units  # type: ignore[union-attr]
        units.arms = {u: arm for u, arm in units.arms.items() if arm == "full" or u % 2}
        for _ in range(3):
            clock.now += 200
            await site.look()
        assert site.verdicts()[-1] == "INVALID"
        assert site.state() == "running"
        assert site.shares() == {"full": 500_000, "pruned": 500_000}
        # Even if the units fit afterwards: the smallest p stays.
        p = site.store.experiments.get("halve").mismatch_p
        assert p < 0.001
        site.serve(5000, first=1000)
        await site.look()
        assert site.verdicts()[-1] == "INVALID"
        assert site.store.experiments.get("halve").mismatch_p <= p

    with caplog.at_level(logging.INFO, "liveprune"):
        run(test())
    assert len([x for x in caplog.messages if "INVALID" in x]) == 1, "told once"


def test_a_dry_run_does_nothing(site: Site, clock: Clock) -> None:
    async def test() -> None:
        await site.start(dry_run=True)
        site.serve(300, loops={"pruned": 0.6})
        await site.look()
        assert site.verdicts() == ["ROLLBACK"]
        assert site.state() == "running"
        assert site.shares()["pruned"] == 500_000

    run(test())


def test_of_two_bad_arms_each_is_rolled_back_and_a_ramp_leaves_them_out(
    site: Site, clock: Clock
) -> None:
    async def test() -> None:
        arms = [
            {"name": "full", "variant": "full", "weight": 0.4},
            {"name": "pruned", "variant": "e4", "weight": 0.2},
            {"name": "less", "variant": "e2", "weight": 0.2},
            {"name": "worst", "variant": "e2", "weight": 0.2},
        ]
        await site.start(arms=arms, ramp=[0.8])
        bad = {"less": 0.8, "worst": 0.8}
        site.serve(500, loops=bad)
        await site.look()
        await site.look()
        assert site.shares() == {"full": 800_000, "pruned": 200_000, "less": 0, "worst": 0}
        assert site.state() == "running"
        site.serve(900, first=1000)
        clock.now += 101
        await site.look()
        assert site.shares() == {"full": 200_000, "pruned": 800_000, "less": 0, "worst": 0}

    run(test())


def test_a_restart_goes_on_where_it_was(site: Site, tmp_path: Path, clock: Clock) -> None:
    async def test() -> None:
        await site.start()
        arms = site.serve(200)
        await site.look()
        site.serve(10, first=200)  # lost: the process is killed
        again = Site(tmp_path, clock)
        await again.worker.load()
        assert again.serve(200) == arms, "the same units, the same arms"
        await again.worker.stop()
        (form,) = site.store.measurements.of("halve").values()
        measured = again.live.measured("halve")
        assert measured is not None
        assert measured.to_json() == form
        counts = [
            measured.phases[0].cells[arm]["e2e_seconds"].moments.count for arm in ("full", "pruned")
        ]
        assert sum(counts) == 400
        assert len(measured.phases[0].units.arms) == 200, "each unit once"
        again.store.close()

    run(test())


def test_a_stop_writes_what_is_left(site: Site) -> None:
    async def test() -> None:
        await site.start()
        site.worker.start()
        await asyncio.sleep(0)
        site.serve(50)
        await site.worker.stop()
        (found,) = site.store.experiments.look()
        assert site.store.experiments.claim(found.name, "another", 5) is not None, "lease given up"
        body = await site.service.get("halve")
        assert sum(arm.requests for arm in body.arms) == 50

    run(test())


def test_a_store_that_is_away_loses_nothing(
    site: Site, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    async def test() -> None:
        site.worker._interval = 0.001
        await site.start()
        away, looks = True, 0
        write = MeasurementRows.write

        def failing(self: Any, *arguments: Any, **named: Any) -> None:
            nonlocal looks
            looks += 1
            if away:
                raise StoreError("store x: gone")
            write(self, *arguments, **named)

        monkeypatch.setattr(MeasurementRows, "write", failing)
        site.worker.start()
        arms = site.serve(40)
        await until(lambda: looks >= 5)
        assert site.serve(40) == arms, "it goes on"
        assert (await site.service.feedback("id-3", 1.0)).arm == arms["user-3"]
        away = False
        seen = looks
        await until(lambda: looks >= seen + 3)
        await site.worker.stop()
        body = await site.service.get("halve")
        assert sum(arm.requests for arm in body.arms) == 80
        assert site.store.measurements.take_answer("id-5").arm == arms["user-5"]

    with caplog.at_level(logging.INFO, "liveprune"):
        run(test())
    about = [x for x in caplog.messages if "store" in x]
    assert about == [
        "experiments go on as they are, and undecided: store x: gone",
        "experiments: the store is back",
    ]


def test_a_damaged_experiment_harms_no_other(site: Site, caplog: Any) -> None:
    async def test() -> None:
        await site.start(traffic=[0, 0.5])
        await site.start(name="rest", traffic=[0.5, 0.75])
        # The alias is one, whichever of its names is given.
        await site.start(name="third", model="other", traffic=[0.75, 1])
        table = schema.experiments
        with site.store.writing() as connection:
            bad = table.update().where(table.c.name == "rest")
            newer = {**experiment(name="rest").to_json(), "novelty": 1}  # of another release
            connection.execute(bad.values(definition=newer))
        site.store.measurements.write({"third": {"version": 9}}, {}, most=9)
        again = Site(Path(site.store.url.partition(":///")[2]).parent, site.clock)
        for _ in range(2):
            await again.look()
        assert {x.experiment.name for x in again.live.running} == {"halve"}
        assert set(again.verdicts()) == {"HOLD"}
        shown = {x.name: x.paused for x in await again.service.newest()}
        assert shown["halve"] is None
        assert "novelty" in str(shown["rest"])
        assert "cannot be read" in str(shown["third"])
        # What cannot be read is not written over.
        assert site.store.measurements.of("third") == {"one": {"version": 9}}
        again.store.close()

    with caplog.at_level(logging.ERROR, "liveprune"):
        run(test())
    assert len([x for x in caplog.messages if "rest: is not run here" in x]) == 1


def ship(site: Site) -> Any:
    async def prepare() -> None:
        await site.start()
        site.serve(400, gain=0.4)
        site.clock.now += 101

    return prepare()


def test_a_swap_that_fails_is_tried_again(site: Site, clock: Clock) -> None:
    async def test() -> None:
        await ship(site)
        site.control.error = ConflictError("operation x is under way")
        assert await site.promoted() == ["e4"]
        site.control.error = VariantError("no free slot")
        assert await site.promoted() == ["e4"] * 2, "busy is not failed: at the next look"
        found = await site.service.get("halve")
        assert found.state == "shipped"
        assert str(found.reason).endswith("one still swaps to e4 (no free slot)")
        site.control.error = None
        assert await site.promoted() == ["e4"] * 2, "a while later"
        clock.now += 10
        site.control.steps = [State.FILLING, State.FAILED]
        assert await site.promoted() == ["e4"] * 3
        site.control.steps = [State.FILLING, State.DONE]
        clock.now += 19
        assert await site.promoted() == ["e4"] * 3, "twice as long"
        clock.now += 1
        assert await site.promoted() == ["e4"] * 4
        assert await site.promoted() == ["e4"] * 4
        assert site.store.decisions.promotions() == []

    run(test())


def test_an_operators_swap_is_not_undone(site: Site, clock: Clock) -> None:
    async def test() -> None:
        await ship(site)
        site.control.error = VariantError("no free slot")
        await site.promoted()
        operation = {"id": "1", "kind": "rollback", "variant": "tiny:full", "state": "failed"}
        operation |= {"error": None, "seconds": {}, "notes": [], "created": clock.now + 1}
        site.store.swaps.add({**operation, "finished": clock.now + 2}, "one")
        clock.now += 100
        assert len(await site.promoted()) == 2, "one that failed moved nothing"
        done = {**operation, "id": "2", "state": "done", "finished": clock.now + 2}
        site.store.swaps.add({**done, "id": "3"}, "two")
        clock.now += 100
        assert len(await site.promoted()) == 3, "another replica's"
        site.store.swaps.add(done, "one")
        clock.now += 100
        assert len(await site.promoted()) == 3
        assert site.store.decisions.promotions() == []

    run(test())


def test_of_several_winners_only_the_last_is_swapped_to(site: Site, clock: Clock) -> None:
    async def test() -> None:
        await ship(site)
        site.control.error = VariantError("no")
        await site.promoted()
        arms = [{"name": "a", "variant": "full", "weight": 0.5}]
        arms.append({"name": "b", "variant": "e2", "weight": 0.5})
        site.control.error = None
        clock.now += 1
        await site.start(name="next", arms=arms, control="a")
        for number in range(400):
            found = site.route(f"u{number}")
            assert found is not None
            values = {"e2e_seconds": 1.0 + number % 3 / 10 - 0.5 * (found.arm == "b"), "loop": 0.0}
            site.live.finished(found, values)
        clock.now += 101
        assert await site.promoted() == ["e4", "e2"]
        assert site.store.decisions.promotions() == []

    run(test())


def test_feedback_is_counted_once(site: Site, tmp_path: Path, clock: Clock) -> None:
    async def test() -> None:
        await site.start()
        arms = site.serve(30)
        found = await site.service.feedback("id-1", 0.25)
        assert (found.experiment, found.arm) == ("halve", arms["user-1"])
        await site.look()
        await site.service.feedback("id-2", 0.75)
        for known in ("id-1", "id-2", "never"):
            with pytest.raises(UnknownExperimentError, match=f"answer '{known}': found none"):
                await site.service.feedback(known, 1.0)
        await site.look()
        body = await site.service.get("halve")
        scores = {arm.name: arm.metrics.get("score") for arm in body.arms}
        expected = {"full": [], "pruned": []}
        for user, score in (("user-1", 0.25), ("user-2", 0.75)):
            expected[arms[user]].append(score)
        for arm, values in expected.items():
            metric = scores[arm]
            assert (metric.count if metric else 0) == len(values)
            if metric:
                assert metric.mean == pytest.approx(sum(values) / len(values))
        await site.service.stop("halve", "")
        with pytest.raises(ConflictError, match="halve does not run here"):
            await site.service.feedback("id-4", 1.0)

    run(test())


def test_a_phase_of_another_replica_takes_scores(site: Site, tmp_path: Path, clock: Clock) -> None:
    async def test() -> None:
        await site.start()
        other = Site(tmp_path, clock, "two")
        await other.look()
        await site.service.move("halve", {"full": 0.4, "pruned": 0.6})
        arms = site.serve(5)
        await site.look()
        found = await other.service.feedback("id-0", 1.0)
        assert found.arm == arms["user-0"]
        measured = other.live.measured("halve")
        assert measured is not None
        assert measured.phases[1].cells[found.arm]["score"].moments.count == 1
        other.store.close()

    run(test())


def test_what_cannot_be_started(site: Site) -> None:
    async def test() -> None:
        bad = [
            ({"model": "strange"}, ExperimentError, "model: found 'strange', expected one of tiny"),
            ({"alpha": 7}, ExperimentError, "alpha"),
            (
                {
                    "arms": [
                        *definition()["arms"][:1],
                        {"name": "x", "variant": "off", "weight": 0.5},
                    ]
                },
                ConflictError,
                "arm x: the variant 'off' is standby here, expected live: `liveprune variants add",
            ),
            (
                {
                    "arms": [
                        *definition()["arms"][:1],
                        {"name": "x", "variant": "no", "weight": 0.5},
                    ]
                },
                ConflictError,
                "'no' is unknown here",
            ),
        ]
        for changes, kind, message in bad:
            for call in (site.service.check, lambda x: site.service.start(x, key=None)):
                with pytest.raises(kind, match=message):
                    await call(definition(**changes))
        assert site.store.experiments.newest() == []
        found = await site.service.check(definition())
        assert (found.model, found.alpha) == ("tiny", 0.05)
        assert site.store.experiments.newest() == [], "only checked"
        await site.start(model="other")
        with pytest.raises(ConflictError, match="was used before"):
            await site.service.check(definition())

    run(test())


def test_weights_move_as_little_as_they_can(site: Site, clock: Clock) -> None:
    async def test() -> None:
        await site.start(ramp=[0.8])
        before = site.serve(300)
        clock.now += 5
        body = await site.service.move("halve", {"full": 0.1, "pruned": 0.9})
        assert [(arm.name, arm.share) for arm in body.arms] == [("full", 0.1), ("pruned", 0.9)]
        assert (body.phase, body.phase_started) == (1, clock.now)
        after = site.serve(300)
        assert all(after[user] == "pruned" for user, arm in before.items() if arm == "pruned")
        assert sum(arm == "full" for arm in after.values()) < 60
        for weights, message in (
            ({"full": 0.5}, "pruned: found None"),
            ({"full": 0.5, "pruned": 0.6}, "sum to 1.1"),
            ({"full": 0.5, "pruned": 0.4, "x": 0.1}, "x"),
            ({"full": 1.0, "pruned": 0.0}, "no weight outside the control arm"),
        ):
            with pytest.raises(ExperimentError, match=message):
                await site.service.move("halve", weights)
        for _ in range(2):
            site.store.experiments.newest()
        assert site.store.experiments.get("halve").version == 2

    run(test())


def test_phases_are_bounded(site: Site) -> None:
    async def test() -> None:
        await site.start()
        for i in range(49):
            site.store.experiments.move("halve", {"full": 600_000 + i, "pruned": 400_000 - i})
        with pytest.raises(ConflictError, match="has had 50 phases, expected fewer than 50"):
            await site.service.move("halve", {"full": 0.5, "pruned": 0.5})

    run(test())
