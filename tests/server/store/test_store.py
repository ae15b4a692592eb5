"""Variants and servers: what replicas share, what a crash leaves, backups, quotas."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.errors import ConflictError, StoreError
from liveprune.pruning.plan import Plan
from liveprune.server.store.check import check, repair
from liveprune.server.store.jobs import JobState
from liveprune.server.store.quota import check_room, used_bytes
from liveprune.server.store.store import Store
from liveprune.server.store.transfer import back_up, export, restore
from tests.server.fake_engine import fake_plan

A, B = fake_plan([0, 1, 2, 3]), fake_plan([2, 3, 4], top_k=2)
STATE = {"live": ["full"], "alias": "full"}
Open = Callable[..., Store]


@pytest.fixture
def opened(url: str, tmp_path: Path) -> Iterator[Open]:
    stores: list[Store] = []

    def make(replica: str = "one", **options: Any) -> Store:
        stores.append(Store(tmp_path / "files", "m", url=url, replica=replica, **options))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def save(store: Store, variants: dict[str, Plan], before: dict[str, Plan], **state: Any) -> None:
    sizes = {plan.digest: store.plans.save(plan) for plan in variants.values()}
    store.servers.save(
        {**STATE, **state},
        variants={tag: plan.digest for tag, plan in variants.items()},
        before={tag: plan.digest for tag, plan in before.items()},
        sizes=sizes,
    )


def digests(store: Store) -> dict[str, str]:
    return {tag: variant.digest for tag, variant in store.variants.all().items()}


def test_each_replica_has_its_state_and_all_have_the_variants(opened: Open) -> None:
    one, two = opened("one"), opened("two")
    save(one, {"a": A}, {}, live=["full", "a"], alias="a")
    save(two, {"b": B}, {})
    assert digests(one) == digests(two) == {"a": A.digest, "b": B.digest}
    assert one.servers.read() == {"live": ["full", "a"], "alias": "a"}
    assert two.servers.read() == STATE
    assert opened("three").servers.read() is None
    assert sorted(one.servers.all()) == ["one", "two"]
    save(one, {"a": A}, {"a": A}, alias="full")  # what the other added stays
    assert digests(one) == {"a": A.digest, "b": B.digest}


def test_what_another_replica_serves_is_not_forgotten(opened: Open) -> None:
    one, two = opened("one"), opened("two")
    save(one, {"a": A}, {})
    save(two, {"a": A}, {"a": A}, live=["a"], alias="a")
    with pytest.raises(ConflictError, match="'a': is live on two; remove it there first"):
        save(one, {}, {"a": A})
    assert digests(one) == {"a": A.digest}
    save(two, {"a": A}, {"a": A})
    save(one, {}, {"a": A})
    assert digests(two) == {}


def test_published_by_a_job(opened: Open) -> None:
    store = opened()
    size = store.plans.save(A)
    lineage = {"method": "reap", "seed": 3}
    for _ in range(2):  # its last step may be repeated
        store.variants.publish("found", A.digest, size, lineage, job="j" * 32)
    (variant,) = store.variants.all().values()
    assert (variant.tag, variant.lineage, variant.job) == ("found", lineage, "j" * 32)
    with pytest.raises(ConflictError, match=f"names the plan {A.digest}, expected a new tag"):
        store.variants.publish("found", B.digest, 1, {}, job=None)
    assert store.variants.plans() == {A.digest: size}
    assert not store.variants.drop_plan(A.digest)
    assert check(store) == []


def test_several_publish_the_same_at_once(opened: Open) -> None:
    """Whoever comes second finds what the first has written, and does not fail over it."""
    stores, rounds = [opened(f"r{i}") for i in range(3)], 8
    size, barrier = stores[0].plans.save(A), threading.Barrier(3)

    def publish(store: Store) -> None:
        for number in range(rounds):
            barrier.wait(60)
            store.variants.publish(f"v{number}", A.digest, size, {}, job=None)
            store.settings.set(f"s{number}", number)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(publish, stores))
    assert digests(stores[0]) == {f"v{i}": A.digest for i in range(rounds)}
    assert stores[0].variants.plans() == {A.digest: size}
    assert [stores[1].settings.get(f"s{i}") for i in range(rounds)] == list(range(rounds))


def test_logs_and_settings(opened: Open) -> None:
    store = opened()
    store.evaluations.add("dev", None, {"mean": 0.5})
    store.evaluations.add("dev", A.digest, {"mean": 0.25}, job="j")
    newest, oldest = store.evaluations.list()
    assert (newest["digest"], newest["scores"], oldest["job"]) == (A.digest, {"mean": 0.25}, None)
    assert [x["job"] for x in store.evaluations.list(job="j")] == ["j"]
    assert len(store.evaluations.list(limit=1)) == 1
    assert store.settings.get("background", default=1) == 1
    for value in ({"enabled": False}, {"enabled": True}):
        store.settings.set("background", value)
        assert opened("two").settings.get("background") == value


def test_numbers_that_json_has_not_are_refused(opened: Open) -> None:
    with pytest.raises(StoreError, match="not JSON compliant"):
        opened().evaluations.add("dev", None, {"mean": float("nan")})


def test_check_names_what_is_wrong(opened: Open, tmp_path: Path) -> None:
    store = opened()
    save(store, {"a": A, "b": B}, {}, live=["full", "gone"])
    left = fake_plan([5])
    store.plans.save(left)
    store.plans.discard(A.digest)
    found = {finding.what: finding.harmless for finding in check(store)}
    expected = ("variant a: ", "server one: serves gone", str(store.plans.path(left.digest)))
    assert [[x for x in found if x.startswith(begin)] != [] for begin in expected] == [True] * 3
    assert len(found) == 3
    assert list(found.values()) == [False, False, True]
    assert repair(store) == []  # it may be in the making
    hour_ago = time.time() - 3601
    os.utime(store.plans.path(left.digest), (hour_ago, hour_ago))
    assert repair(store) == [f"{left.digest}.json"]
    assert len(check(store)) == 2


def test_a_backup_moves_between_databases(opened: Open, tmp_path: Path) -> None:
    store = opened()
    save(store, {"a": A, "b": B}, {}, live=["a"], alias="a")
    job = store.jobs.add({"method": "reap"})
    store.jobs.ask_cancel(job.id)
    store.evaluations.add("dev", A.digest, {"mean": 0.25}, job=job.id)
    store.audit.add("c", "asked", {"who": "me"}, "one")
    back_up(store, tmp_path / "backup.tar")
    assert (tmp_path / "backup.tar").stat().st_mode & 0o777 == 0o600
    other = Store(tmp_path / "elsewhere", "m", replica="one")
    restore(other, tmp_path / "backup.tar")
    assert export(other) == export(store)
    assert other.plans.load(B.digest) == B
    assert check(other) == []
    assert other.jobs.get(job.id).state is JobState.CANCELLED
    other.audit.add("d", "asked", {}, "one")  # numbers go on counting
    with pytest.raises(ConflictError, match="not empty"):
        restore(other, tmp_path / "backup.tar")
    stranger = Store(tmp_path / "stranger", "x")
    with pytest.raises(StoreError, match="model is 'm', expected 'x'"):
        restore(stranger, tmp_path / "backup.tar")
    (tmp_path / "bad.tar").write_text("nonsense")
    with pytest.raises(StoreError, match="not readable as a backup"):
        restore(stranger, tmp_path / "bad.tar")
    for each in (other, stranger):
        each.close()


def test_quotas(opened: Open, tmp_path: Path) -> None:
    store = opened(quota=10_000_000)
    store.check_room()
    (store.files / "large").write_bytes(bytes(100_000))
    assert used_bytes(store.files) >= 100_000
    with pytest.raises(StoreError, match=r"expected less than the quota of 100,000 "):
        check_room(store.files, 100_000)
    check_room(store.files, 0)


def test_folders_of_old_jobs_go(opened: Open) -> None:
    store = opened(keep_jobs=1)
    jobs = [store.jobs.add({"number": i}) for i in range(4)]
    for job in jobs[:3]:
        store.jobs.ask_cancel(job.id)
    for job in jobs:
        (store.files / "jobs" / job.id).mkdir(parents=True)
    assert store.drop_old_jobs() == [jobs[1].id, jobs[0].id]
    left = {path.name for path in (store.files / "jobs").iterdir()}
    assert left == {jobs[2].id, jobs[3].id}


def _publish(url: str, files: Path, number: int) -> None:
    store = Store(files, "m", url=url, replica="one")
    for i in range(number, number + 100):
        plan = fake_plan([i % 7, 7], top_k=1 + i % 2)
        size = store.plans.save(plan)
        store.variants.publish(f"v{plan.digest[:8]}", plan.digest, size, {}, job=None)


def test_killed_while_publishing_shows_no_half_of_a_variant(
    opened: Open, url: str, tmp_path: Path
) -> None:
    context, draw = multiprocessing.get_context("fork"), random.Random(1)
    store = opened("two")
    for number in range(12):
        child = context.Process(target=_publish, args=(url, tmp_path / "files", number))
        child.start()
        time.sleep(draw.uniform(0.03, 0.2) * 1.2**number)  # a slow machine gets there, too
        if child.pid is not None and child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert [x for x in check(store) if not x.harmless] == []
    assert store.variants.all()
    repair(store, age=0)
    assert check(store) == []
    assert {x.name for x in store.plans.folder.iterdir()} == {
        f"{digest}.json" for digest in digests(store).values()
    }
