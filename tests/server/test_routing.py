"""What an alias routes to while experiments run, over a real registry."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from liveprune.patches.admission import Admission
from liveprune.pruning.model_spec import ModelSpec
from liveprune.server.experiments.assignment import allocate, arm_of, point
from liveprune.server.experiments.definition import experiment_from
from liveprune.server.experiments.live import LiveExperiments, Running
from liveprune.server.registry import Registry
from liveprune.server.routing import GENERATING, Routing
from liveprune.server.variant import FULL, Variant
from tests.server.fake_engine import fake_base
from tests.server.live_world import A

SALT = b"s" * 32
CHAT = "/v1/chat/completions"


class Body(BaseModel):
    model_config = ConfigDict(extra="allow")
    model: str = "m"
    user: str | None = None


class World:
    """An alias ``m`` (also ``too``) that serves ``full``, with ``a`` live beside it."""

    def __init__(self, folder: Path) -> None:
        self.registry = Registry("m", ["too"], ModelSpec.from_path(fake_base(folder)), slots=4)
        self.registry.adopt(self.registry.known[FULL], 0)
        self.registry.go_live(self.registry.claim(Variant("a", A)))
        self.experiments = LiveExperiments(SALT, lambda: 1e6)
        self.routing = Routing(self.registry, self.experiments)

    def run(self, **changes: Any) -> None:
        """Start an experiment, half ``full`` (control) and half ``a``."""
        form = {
            "name": "x",
            "model": "m",
            "arms": [
                {"name": "control", "variant": "full", "weight": 0.5},
                {"name": "pruned", "variant": "a", "weight": 0.5},
            ],
            "control": "control",
            "primary": {"metric": "e2e_seconds"},
            **changes,
        }
        found = experiment_from(form)
        self.experiments.install([Running(found, (found.shares,), 0.0)])

    def ask(
        self, model: str = "m", path: str = CHAT, headers: Any = None, **fields: Any
    ) -> Admission:
        raw = [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
        asked = Admission(self.routing, scope={"type": "http", "path": path, "headers": raw})
        asked.body = Body(model=model, **fields)
        asked.admit(model)
        return asked


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def arm(unit: str) -> str:
    """The arm of a unit, worked out beside the code under test."""
    half = allocate([{"control": 500_000, "pruned": 500_000}])
    return arm_of(half, point(SALT, "arm:x", unit))


def served(asked: Admission) -> str:
    assert asked.served is not None
    return asked.served.name


VARIANTS = {"control": "m:full", "pruned": "m:a"}


def test_without_experiments_the_alias_serves_what_it_did(world: World) -> None:
    for model, name in (("m", "m:full"), ("too", "m:full"), ("m:a", "m:a")):
        asked = world.ask(model)
        assert (served(asked), asked.assignment) == (name, None)
    assert world.ask("other").served is None
    world.registry.alias = "a"
    assert served(world.ask()) == "m:a"


@pytest.mark.parametrize("model", ["m", "too"])
def test_units_choose_the_arm(model: str, world: World) -> None:
    world.run()
    seen: Counter[str] = Counter()
    for i in range(40):
        unit = f"u{i}"
        expected = arm(f"body:user={unit}")
        for _ in range(2):
            asked = world.ask(model, user=unit)
            assert served(asked) == VARIANTS[expected]
            assert (asked.assignment.experiment, asked.assignment.arm) == ("x", expected)
            assert asked.counted, "all of the alias is users' traffic"
        seen[expected] += 1
    assert set(seen) == set(VARIANTS)


def test_where_a_unit_is_looked_for(world: World) -> None:
    world.run()
    everything: dict[str, Any] = {
        "headers": {
            "X-Liveprune-Unit": "h",
            "Authorization": "Bearer secret",
            "X-Api-Key": "other",
            "X-Request-Id": "r",
        },
        "user": "u",
        "prompt_cache_key": "c",  # a field that is not the body's own
    }
    key = f"api-key={world.experiments.key_id('secret')}"
    units = ["header:x-liveprune-unit=h", "body:user=u", "body:prompt_cache_key=c", key]
    units += [f"api-key={world.experiments.key_id('other')}", "request-id=r"]
    routed: list[str] = []
    original = world.experiments._assigned

    def noting(running: Running, name: str, unit: str) -> Any:
        routed.append(unit)
        return original(running, name, unit)

    world.experiments._assigned = noting  # type: ignore[method-assign]
    for taken in ("X-Liveprune-Unit", "user", "prompt_cache_key", "Authorization", "X-Api-Key", ""):
        world.ask(**everything)
        everything.pop(taken, None)
        everything["headers"].pop(taken, None)
    assert routed == units


@pytest.mark.parametrize("value", ["Basic abc", "Bearer", "Bearer  ", ""])
def test_what_is_no_key_is_no_unit(value: str, world: World) -> None:
    world.run(unit=["api-key", "request-id"])
    assert {
        served(world.ask(headers={"authorization": value, "x-request-id": str(i)}))
        for i in range(40)
    } == set(VARIANTS.values())


def test_a_key_is_never_kept(world: World) -> None:
    found = world.experiments.key_id("secret")
    assert found == LiveExperiments(SALT, lambda: 0).key_id("secret")
    assert found != LiveExperiments(b"t" * 32, lambda: 0).key_id("secret")
    assert "secret" not in found
    assert len(found) == 32


def test_without_any_unit_each_request_is_its_own(world: World) -> None:
    world.run()
    assert {served(world.ask()) for _ in range(60)} == set(VARIANTS.values())


def test_pinned_names_take_no_part(world: World) -> None:
    world.run()
    for i in range(20):
        for model in ("m:full", "m:a"):
            asked = world.ask(model, user=str(i))
            assert (served(asked), asked.assignment, asked.counted) == (model, None, False)
    measured = world.experiments.measured("x")
    assert measured is not None
    assert measured.phases[0].units.sampled() == {}


@pytest.mark.parametrize("path", sorted(GENERATING))
def test_paths_that_generate_are_routed(path: str, world: World) -> None:
    world.run()
    assert {served(world.ask(path=path, user=str(i))) for i in range(20)} == set(VARIANTS.values())


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/tokenize", {}),
        ("/v1/chat/completions/render", {}),
        ("/generative_scoring", {}),
        ("/v1/responses", {"background": True}),
    ],
)
def test_others_get_what_the_alias_serves(path: str, fields: Any, world: World) -> None:
    world.run()
    for i in range(20):
        asked = world.ask(path=path, user=str(i), **fields)
        assert (served(asked), asked.assignment) == ("m:full", None)


def test_a_request_that_was_not_parsed_is_not_routed(world: World) -> None:
    world.run()
    for i in range(20):
        headers = [(b"x-request-id", str(i).encode())]
        asked = Admission(world.routing, scope={"path": CHAT, "headers": headers})
        asked.admit("m")
        assert (served(asked), asked.assignment) == ("m:full", None)


def test_an_experiment_with_a_variant_that_is_not_live_is_left_alone(world: World) -> None:
    world.run()
    gone = world.registry.live["a"]
    world.registry.leave(gone)
    for i in range(20):
        assert served(world.ask(user=str(i))) == "m:full"
    assert world.experiments.paused == {"x": "not live here: a"}


def test_experiments_on_other_models_are_not_ours(world: World) -> None:
    world.run(model="another")
    assert {served(world.ask(user=str(i))) for i in range(20)} == {"m:full"}


def test_a_routed_request_pins_its_variant(world: World) -> None:
    world.run()
    asked = next(x for x in (world.ask(user=str(i)) for i in range(40)) if served(x) == "m:a")
    before = world.registry.in_flight(world.registry.live["a"])
    assert before > 0
    asked.release()
    assert world.registry.in_flight(world.registry.live["a"]) == before - 1


def test_it_shows_the_registrys_cards(world: World) -> None:
    assert world.routing.cards() == world.registry.cards() != []
