"""Experiments, measurements, decisions, answers and the salt, on both kinds of database."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from liveprune.pruning.errors import ConflictError, ExperimentError
from liveprune.server.experiments.actions import Outcome
from liveprune.server.experiments.assignment import allocate
from liveprune.server.experiments.live import Assignment
from liveprune.server.experiments.measurements import Measurements
from liveprune.server.store import decisions as decision_rows
from liveprune.server.store import schema
from liveprune.server.store.check import check
from liveprune.server.store.database import open_database, transaction
from liveprune.server.store.experiment_rows import ExperimentState, UnknownExperimentError
from liveprune.server.store.measurements import LONGEST_ID
from liveprune.server.store.store import Store
from liveprune.server.store.transfer import back_up, export, restore
from tests.server.experiment_world import START, Clock, experiment

Open = Callable[..., Store]
HALF = {"full": 500_000, "pruned": 500_000}
MOVED = {"full": 300_000, "pruned": 700_000}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(url: str, tmp_path: Path, clock: Clock) -> Iterator[Open]:
    stores: list[Store] = []

    def make(replica: str = "one", **options: Any) -> Store:
        given = {"url": url, "replica": replica, "clock": clock, **options}
        stores.append(Store(tmp_path / "files", "m", **given))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def answer(number: int = 1, **changes: Any) -> Assignment:
    found = Assignment("halve", "pruned", "e4", None, 0, 2**64 - number, counted=True, fidelity=0.5)
    return dataclasses.replace(found, **changes)


def decision(verdict: str = "HOLD", arm: str | None = None, p: float = 1.0) -> dict[str, Any]:
    return {"verdict": verdict, "arm": arm, "mismatch_p": p}


def decide(
    store: Store,
    clock: Clock,
    outcome: Outcome | None = None,
    *,
    news: bool = False,
    found: Any = None,
    owner: str = "me",
    **changes: Any,
) -> bool:
    row = found or store.experiments.get("halve")
    return store.decisions.add(
        row,
        owner,
        decision(**changes),
        {"r": clock.now},
        outcome or Outcome(),
        moment=clock.now,
        news=news,
        reason="because",
    )


def test_an_older_database_gets_the_tables(url: str) -> None:
    engine = sa.create_engine(url)
    config = Config()
    folder = Path(decision_rows.__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        row = {"model": "m", "key": "k", "value": 7, "updated": 1.0}
        connection.execute(schema.settings.insert().values(row))
        assert "experiments" not in sa.inspect(connection).get_table_names()
    engine.dispose()
    engine = open_database(url)
    with transaction(engine) as connection:
        assert connection.scalar(sa.select(schema.settings.c.value)) == 7
        assert connection.execute(sa.select(schema.experiments)).all() == []
    engine.dispose()


def test_an_experiment_starts_moves_and_stops(opened: Open, clock: Clock) -> None:
    one, two = opened("one"), opened("two")
    found = one.experiments.add(experiment())
    assert (found.state, found.created, found.started) == (ExperimentState.RUNNING, START, START)
    assert two.experiments.look() == [found]
    assert found.experiment == experiment()
    assert found.shares == (HALF,)
    clock.now += 5
    moved = two.experiments.move("halve", MOVED)
    assert moved.shares == (HALF, MOVED)
    assert (moved.phase_started, moved.version) == (START + 5, found.version + 1)
    # The order of arms is a part of who gets which: it comes back as it was.
    (there,) = one.experiments.look()
    assert allocate(there.shares) == allocate([HALF, MOVED])
    assert list(there.shares[0]) == ["full", "pruned"]
    assert one.experiments.move("halve", MOVED) == moved, "nothing to change"
    clock.now += 5
    ended = one.experiments.stop("halve", "enough")
    assert (ended.state.value, ended.ended, ended.reason) == ("stopped", START + 10, "enough")
    assert two.experiments.look() == []
    with pytest.raises(ConflictError, match="halve: has ended: stopped"):
        two.experiments.stop("halve", "")
    with pytest.raises(ConflictError, match="halve: is stopped, expected a running one"):
        two.experiments.move("halve", HALF)
    for call in (one.experiments.get, lambda name: one.experiments.stop(name, "")):
        with pytest.raises(UnknownExperimentError, match="'none': found none of this name"):
            call("none")
    with pytest.raises(ConflictError, match="halve: the name was used before"):
        two.experiments.add(experiment())
    assert [x.name for x in two.experiments.newest()] == ["halve"]


def test_another_models_experiments_are_not_seen(opened: Open, url: str, tmp_path: Path) -> None:
    opened().experiments.add(experiment())
    other = Store(tmp_path / "files", "another", url=url, replica="one")
    assert (other.experiments.look(), other.experiments.newest()) == ([], [])
    other.experiments.add(experiment())
    other.experiments.stop("halve", "")
    other.close()
    assert len(opened().experiments.look()) == 1


def test_a_key_gives_the_same_experiment(opened: Open) -> None:
    store = opened()
    first = store.experiments.add(experiment(), key="k")
    assert store.experiments.add(experiment(), key="k") == first
    assert store.experiments.by_key("k") == first
    assert store.experiments.by_key("other") is None
    with pytest.raises(ConflictError, match=r"'k': came with another request, which began.* halve"):
        store.experiments.add(experiment(alpha=0.1), key="k")


def test_units_of_one_alias_belong_to_one_experiment(opened: Open, clock: Clock) -> None:
    store = opened()
    later = {"start": START + 100}
    store.experiments.add(experiment(traffic=[0, 0.5], **later))
    with pytest.raises(ExperimentError, match=r"quarter: traffic: found .* which experiment halve"):
        store.experiments.check(experiment(name="quarter", traffic=[0.25, 0.75]))
    with pytest.raises(ExperimentError, match="which experiment halve owns"):
        store.experiments.add(experiment(name="quarter", traffic=[0.25, 0.75]))
    store.experiments.add(experiment(name="rest", traffic=[0.5, 1]))
    store.experiments.stop("halve", "")
    store.experiments.add(experiment(name="quarter", traffic=[0.25, 0.5]))


def test_at_most_eight_at_once(opened: Open) -> None:
    store = opened()
    for i in range(8):
        store.experiments.add(experiment(name=f"e{i}", traffic=[i / 10, i / 10 + 0.1]))
    with pytest.raises(ConflictError, match="ninth: found 8 others"):
        store.experiments.add(experiment(name="ninth", traffic=[0.9, 1]))
    store.experiments.stop("e3", "")
    store.experiments.add(experiment(name="ninth", traffic=[0.9, 1]))


def test_replicas_that_start_one_name_at_once(opened: Open) -> None:
    stores, barrier = [opened(f"r{i}") for i in range(3)], threading.Barrier(3)

    def start(store: Store) -> str:
        barrier.wait(60)
        try:
            return store.experiments.add(experiment()).name
        except ConflictError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        found = sorted(pool.map(start, stores), key=len)
    assert found[0] == "halve"
    assert ["was used before" in x for x in found] == [False, True, True]


def test_scheduled_start_and_end(opened: Open, clock: Clock) -> None:
    one, two = opened("one"), opened("two")
    scheduled = one.experiments.add(experiment(start=START + 10, end=START + 50))
    assert (scheduled.state.value, scheduled.started, scheduled.phase_started) == (
        "scheduled",
        None,
        None,
    )
    assert two.experiments.look() == []
    with pytest.raises(ConflictError, match="is scheduled, expected a running one"):
        one.experiments.move("halve", MOVED)
    clock.now = START + 12
    (running,) = two.experiments.look()
    assert (running.state.value, running.started, running.phase_started) == (
        "running",
        clock.now,
        clock.now,
    )
    assert one.experiments.look() == [running], "begun once"
    clock.now = START + 50
    assert one.experiments.look() == []
    ended = two.experiments.get("halve")
    assert (ended.state.value, ended.ended, ended.reason) == (
        "stopped",
        clock.now,
        "its time was over",
    )
    with pytest.raises(ConflictError, match="late: its end, 2000000050, has passed"):
        one.experiments.add(experiment(name="late", end=START + 50))


def test_one_replica_decides_until_its_lease_runs_out(opened: Open, clock: Clock) -> None:
    one, two = opened("one"), opened("two")
    row = one.experiments.add(experiment())
    assert one.experiments.claim("halve", "a", 30) == (row, START)
    assert two.experiments.claim("halve", "b", 30) is None
    clock.now += 20
    assert one.experiments.claim("halve", "a", 30) == (row, START + 20), "renewed"
    clock.now += 30
    assert two.experiments.claim("halve", "b", 30) is None, "to its last moment"
    clock.now += 1
    assert two.experiments.claim("halve", "b", 30) is not None
    assert not decide(one, clock, Outcome(MOVED), owner="a"), "slept through its lease"
    assert one.experiments.get("halve") == row
    two.experiments.release("b")
    assert one.experiments.claim("halve", "a", 30) is not None
    one.experiments.stop("halve", "")
    assert one.experiments.claim("halve", "a", 30) is None


def test_a_decision_and_what_it_changes_are_one(opened: Open, clock: Clock) -> None:
    store = opened()
    store.experiments.add(experiment())
    claimed = store.experiments.claim("halve", "me", 30)
    assert claimed is not None
    clock.now += 7
    assert decide(store, clock, Outcome(MOVED), news=True, p=0.25)
    row = store.experiments.get("halve")
    assert (row.shares[-1], row.last_action, row.mismatch_p) == (MOVED, clock.now, 0.25)
    assert row.phase_started == clock.now
    # Decided on what has been changed since: neither the record nor the change is written.
    assert not decide(store, clock, Outcome(HALF), found=claimed[0])
    assert store.experiments.get("halve") == row
    assert len(store.decisions.of("halve")) == 1
    clock.now += 1
    assert decide(store, clock, Outcome(HALF, "rolled_back"), news=True, verdict="ROLLBACK")
    ended = store.experiments.get("halve")
    assert (ended.state.value, ended.reason, ended.ended) == ("rolled_back", "because", clock.now)
    assert ended.shares[-1] == HALF
    newest = store.decisions.newest("halve")
    assert newest is not None
    assert (newest.decision["verdict"], newest.record) == ("ROLLBACK", {"r": clock.now})
    assert store.decisions.get("halve", newest.id) == newest
    with pytest.raises(UnknownExperimentError, match="found no decision 99"):
        store.decisions.get("halve", 99)


def test_decisions_that_say_nothing_new_are_thinned_out(
    opened: Open, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_rows, "MOST_THINNED", 5)
    store = opened()
    store.experiments.add(experiment())
    store.experiments.claim("halve", "me", 1e6)
    clock.now = 2e9 - 2e9 % 60
    first = clock.now
    assert decide(store, clock, news=True)
    ids = []
    for _ in range(12):  # two minutes and the first look of a third
        clock.now += 10
        assert decide(store, clock)
        ids.append(store.decisions.newest_ids()["halve"])
    assert ids == sorted(set(ids)), "a number is never given again"
    times = [x.time - first for x in store.decisions.of("halve")]
    assert times == [0, 50, 110, 120], "the last of each minute, and all that is news"
    for _ in range(10):
        clock.now += 60
        decide(store, clock)
    times = [x.time - first for x in store.decisions.of("halve")]
    assert times == [0, 480, 540, 600, 660, 720]


def test_measurements_are_each_replicas_own(opened: Open, clock: Clock) -> None:
    one, two = opened("one"), opened("two")
    a, b = ({"version": 1, "phases": [i]} for i in (1, 2))
    one.measurements.write({"x": a, "y": a}, {}, most=9)
    clock.now += 1
    two.measurements.write({"x": b}, {}, most=9)
    assert one.measurements.mine(["x", "z"]) == {"x": a}
    assert two.measurements.of("x") == {"one": a, "two": b}
    assert one.measurements.updated() == {
        "x": (("one", START), ("two", START + 1)),
        "y": (("one", START),),
    }
    one.measurements.write({"x": b}, {}, most=9)
    assert two.measurements.of("x") == {"one": b, "two": b}, "written over whole"


def test_answers_are_scored_once_by_any_replica(opened: Open, clock: Clock) -> None:
    one, two = opened("one"), opened("two")
    one.measurements.write({}, {"a": answer(1), "b": answer(2)}, most=9)
    # Clients may choose ids: the same again, and such as no column takes.
    odd = {"a": answer(3), "x" * (LONGEST_ID + 1): answer(), "nul\0": answer()}
    two.measurements.write({}, odd, most=9)
    found = two.measurements.take_answer("a")
    assert (found.experiment, found.arm, found.unit) == ("halve", "pruned", 2**64 - 3)
    assert (found.phase, found.counted) == (0, True)
    for store in (one, two):
        with pytest.raises(UnknownExperimentError, match="answer 'a': found none"):
            store.measurements.take_answer("a")
    clock.now += 86_400
    with pytest.raises(UnknownExperimentError):
        one.measurements.take_answer("b")


def test_answers_are_bounded(opened: Open, clock: Clock) -> None:
    store = opened()

    def left() -> set[str]:
        return {row["response_id"] for row in export(store)["answers"]}

    for i in range(6):
        clock.now += 1
        store.measurements.write({}, {f"a{i}": answer(i + 1)}, most=4)
    assert left() == {"a2", "a3", "a4", "a5"}
    clock.now += 86_398.5
    store.measurements.write({}, {"new": answer(9)}, most=4)
    assert left() == {"a4", "a5", "new"}
    clock.now += 3
    store.measurements.write({}, {"newer": answer(9)}, most=4)
    assert left() == {"new", "newer"}


def test_every_replica_that_there_is_swaps_once(opened: Open, clock: Clock) -> None:
    one, two = opened("one"), opened("two")
    one.experiments.add(experiment())
    one.experiments.claim("halve", "me", 30)
    two.measurements.write({"halve": {"phases": []}}, {}, most=9)
    state = {"live": ["full"], "alias": "full"}
    opened("three").servers.save(state, variants={}, before={}, sizes={})
    assert decide(one, clock, Outcome(state="shipped", promote="e4"), news=True, verdict="SHIP")
    assert one.experiments.get("halve").state is ExperimentState.SHIPPED
    found = two.decisions.promotions()
    assert [(x.replica, x.variant, x.asked) for x in found] == [
        ("one", "e4", START),
        ("three", "e4", START),
        ("two", "e4", START),
    ]
    two.decisions.settle(found[2])
    one.decisions.settle(found[0], "no room")
    assert [(x.replica, x.error) for x in one.decisions.promotions()] == [
        ("one", "no room"),
        ("three", ""),
    ]


def test_the_salt_is_one_secret_of_the_database(
    opened: Open, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stores, barrier = [opened(f"r{i}") for i in range(4)], threading.Barrier(4)

    def ask(store: Store) -> bytes:
        barrier.wait(60)
        return store.salt()

    with ThreadPoolExecutor(4) as pool:
        (salt,) = set(pool.map(ask, stores))
    assert len(salt) == 32
    assert opened().salt() == salt, "after a restart"
    other = Store(tmp_path / "elsewhere", "m")
    assert other.salt() != salt
    other.close()
    back_up(stores[0], tmp_path / "backup.tar")
    for form in (salt, salt.hex().encode(), json.dumps(list(salt)).encode()):
        assert form not in (tmp_path / "backup.tar").read_bytes()
    assert "secrets" not in export(stores[0])


def test_a_backup_has_experiments_and_stops_those_that_ran(
    opened: Open, tmp_path: Path, clock: Clock
) -> None:
    store = opened()
    store.experiments.add(experiment())
    later = START + 1e6
    store.experiments.add(experiment(name="later", traffic=[0, 1], model="other", start=later))
    store.experiments.claim("halve", "me", 30)
    measured = Measurements()
    measured.begin(HALF)
    store.measurements.write({"halve": measured.to_json()}, {"a": answer()}, most=9)
    decide(store, clock, news=True)
    assert check(store) == []
    back_up(store, tmp_path / "backup.tar")
    other = Store(tmp_path / "elsewhere", "m", clock=clock)
    restore(other, tmp_path / "backup.tar")
    assert check(other) == []
    ran = other.experiments.get("halve")
    # Its units would be others, under the new database's salt.
    assert (ran.state.value, ran.reason) == ("stopped", "restored from a backup")
    assert ran.ended is not None
    assert other.experiments.get("later").state.value == "scheduled"
    assert other.measurements.of("halve") == store.measurements.of("halve")
    assert other.decisions.of("halve") == store.decisions.of("halve")
    other.close()


def test_check_names_what_is_wrong(opened: Open) -> None:
    store = opened()
    for name, traffic in (("halve", [0, 0.1]), ("old", [0.1, 0.2]), ("odd", [0.2, 0.3])):
        store.experiments.add(experiment(name=name, traffic=traffic))
    measured = Measurements()
    measured.begin(MOVED)
    lost = {"gone": measured.to_json(), "halve": measured.to_json()}
    store.measurements.write(lost, {}, most=9)
    table = schema.experiments
    with store.writing() as connection:
        bad = {"old": {"ended": 1.0}, "odd": {"history": [{"shares": {"no": 1}, "time": 1.0}]}}
        for name, values in bad.items():
            connection.execute(table.update().where(table.c.name == name).values(values))
    found = {x.what.partition(":")[0]: x.what for x in check(store)}
    assert "found the shares" in found["experiment halve"]
    assert found["experiment old"].endswith("is running, ended at 1.0")
    assert "millionths" in found["experiment odd"]
    assert "is not known" in found["experiment gone"]
    assert len(check(store)) == 4
