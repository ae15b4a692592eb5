"""Two servers of one model on one database, each with an engine of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from liveprune.pruning.errors import VariantError
from liveprune.server.operations import State
from tests.server.live_world import A, B, World, run


def make(tmp_path: Path, url: str, replica: str) -> World:
    store = {"store_url": url, "files": tmp_path / "files", "replica": replica, "model": "m"}
    return World(tmp_path / replica, store=store)


def test_what_one_adds_the_other_can_swap_to(url: str, tmp_path: Path) -> None:
    async def test() -> None:
        one, two = make(tmp_path, url, "one"), make(tmp_path, url, "two")
        for world in (one, two):
            assert await world.control.start() == []
        with pytest.raises(VariantError, match="variant 'a' is unknown"):
            await two.swap("a")
        assert (await one.add("a", A)).state is State.DONE
        assert {v.tag: v.state for v in await two.control.variants()} == {
            "full": "live",
            "a": "standby",
        }
        assert (await two.swap("a")).state is State.DONE
        assert (one.registry.alias, two.registry.alias) == ("full", "a")
        # What the other serves is not forgotten, here or there.
        await one.ended(await one.control.remove("a"))
        operation = await one.ended(await one.control.remove("a"))
        assert "'a': is live on two; remove it there first" in operation.error
        assert (await two.swap("full")).state is State.DONE
        await two.ended(await two.control.remove("a", forget=True))
        assert [v.tag for v in await one.control.variants()] == ["full"]
        for world in (one, two):
            await world.control.stop()

    run(test())


def test_each_comes_back_to_what_it_served(url: str, tmp_path: Path) -> None:
    async def test() -> None:
        one, two = make(tmp_path, url, "one"), make(tmp_path, url, "two")
        for world in (one, two):
            assert await world.control.start() == []
        await one.add("a", A)
        await two.add("b", B)
        await one.swap("a")
        await two.swap("b")
        for world in (one, two):
            await world.control.stop()
        for replica, tag in (("one", "a"), ("two", "b")):
            world = make(tmp_path, url, replica)
            assert await world.control.start() == []
            assert world.registry.alias == tag
            assert world.registry.known.keys() == {"full", "a", "b"}
            kinds = [x["kind"] for x in world.folder.store.swaps.list(replica=replica)]
            assert "swap" in kinds
            await world.control.stop()

    run(test())


def test_a_job_publishes_while_it_serves(url: str, tmp_path: Path) -> None:
    async def test() -> None:
        world = make(tmp_path, url, "one")
        assert await world.control.start() == []
        store = world.folder.store
        store.variants.publish("found", A.digest, store.plans.save(A), {}, job="j" * 32)
        assert (await world.swap("found")).state is State.DONE
        assert world.registry.alias == "found"
        world.check()
        await world.control.stop()

    run(test())
