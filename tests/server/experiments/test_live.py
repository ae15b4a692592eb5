from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiments.definition import Experiment, experiment_from
from liveprune.server.experiments.live import Assignment, LiveExperiments, Running
from liveprune.server.experiments.measurements import Measurements

SALT = b"salt"
LIVE = {"full", "e4"}


def experiment(name: str = "halve", *, shadow: bool = False, **changes: Any) -> Experiment:
    form = {
        "name": name,
        "model": "m",
        "arms": [
            {"name": "full", "variant": "full", "weight": 0.5},
            {"name": "pruned", "variant": "e4", "weight": 0.5, "shadow": shadow},
        ],
        "control": "full",
        "primary": {"metric": "e2e_seconds"},
        "warm_up_seconds": 60,
        **changes,
    }
    return experiment_from(form)


class World:
    """Experiments at a time that the test says."""

    def __init__(self, *experiments: Experiment, salt: bytes = SALT) -> None:
        self.now = 1000.0
        self.live = LiveExperiments(salt, lambda: self.now)
        self.live.install([Running(x, (x.shares,), 900.0) for x in experiments])

    def route(self, user: str, live: set[str] = LIVE, model: str = "m") -> Assignment | None:
        return self.live.route(model, {}, {"user": user}, None, f"request-{user}", live)

    def arm(self, user: str) -> str:
        found = self.route(user)
        assert found is not None
        return found.arm

    def units(self, name: str = "halve", phase: int = 0) -> Counter[str]:
        measured = self.live.measured(name)
        assert measured is not None
        return Counter(measured.phases[phase].units.sampled())


def test_a_unit_keeps_its_arm_in_every_process() -> None:
    one, two = World(experiment()), World(experiment())
    users = [f"u{i}" for i in range(400)]
    arms = [one.arm(user) for user in users]
    assert arms == [two.arm(user) for user in users] == [one.arm(user) for user in users]
    assert 150 < arms.count("full") < 250
    assert one.units() == Counter(arms), "each unit is counted once"
    assert [World(experiment(), salt=b"other").arm(user) for user in users] != arms


def test_what_a_request_is_given() -> None:
    world = World(experiment(fidelity=0.25), experiment("other", traffic=[0, 0.5], model="n"))
    found = [x for i in range(20) if (x := world.route(f"u{i}"))]
    for x in found:
        variant = {"full": "full", "pruned": "e4"}[x.arm]
        assert (x.experiment, x.variant, x.shadow, x.phase) == ("halve", variant, None, 0)
        assert (x.counted, x.fidelity) == (True, 0.25)
    assert {x.arm for x in found} == {"full", "pruned"}
    assert world.route("u1", model="unknown") is None
    assert world.live.control_of("halve") == "full"
    assert world.live.control_of("gone") is None


def test_a_shadow_is_answered_by_the_control_arm() -> None:
    world = World(experiment(shadow=True))
    found = [x for i in range(20) if (x := world.route(f"u{i}"))]
    assert {(x.arm, x.variant, x.shadow) for x in found} == {
        ("full", "full", None),
        ("pruned", "full", "e4"),
    }


def test_outside_of_its_layer_nobody_takes_part() -> None:
    world = World(experiment("a", traffic=[0, 0.3]), experiment("b", traffic=[0.3, 0.6]))
    found = [world.route(f"u{i}") for i in range(600)]
    names = Counter(None if x is None else x.experiment for x in found)
    for name, share in (("a", 0.3), ("b", 0.3), (None, 0.4)):
        assert names[name] / 600 == pytest.approx(share, abs=0.06)


def test_a_variant_that_is_not_live_pauses_the_whole_experiment() -> None:
    world = World(experiment())
    assert all(world.route(f"u{i}", {"full"}) is None for i in range(20))
    assert world.live.paused == {"halve": "not live here: e4"}
    assert not world.units(), "to count one arm only would look like a mismatch"
    assert world.arm("u1")
    assert world.live.paused == {}


def test_the_warm_up_of_each_phase_is_not_counted() -> None:
    world = World(experiment())
    world.now = 959.9
    found = world.route("u1")
    assert found is not None
    assert not found.counted
    world.live.finished(found, {"e2e_seconds": 1.0})
    world.live.answered("id", found)
    assert world.live.answers() == {}
    assert not world.units()
    world.now = 960.0
    assert world.arm("u1")
    assert world.units().total() == 1
    measured = world.live.measured("halve")
    assert measured is not None
    assert measured.phases[0].cells == {}


def test_measures_go_to_the_phase_that_the_request_began_in() -> None:
    world, subject = World(experiment()), experiment()
    before = world.route("u1")
    assert before is not None
    moved = {"full": 100_000, "pruned": 900_000}
    world.live.install([Running(subject, (subject.shares, moved), 1000.0)])
    world.now = 2000.0
    after = [x for i in range(50) if (x := world.route(f"u{i}"))]
    assert {x.phase for x in after} == {1}
    world.live.finished(before, {"e2e_seconds": 1.0, "loop": 0.0})
    world.live.finished(after[0], {"e2e_seconds": 3.0})
    measured = world.live.measured("halve")
    assert measured is not None
    first, second = measured.phases
    assert first.cell(before.arm, "e2e_seconds").moments.mean == 1.0
    assert second.cell(after[0].arm, "e2e_seconds").moments.mean == 3.0
    assert world.units(phase=0).total() == 1
    assert world.units(phase=1).total() == 50
    with pytest.raises(ExperimentError, match="loop"):
        world.live.finished(before, {"loop": 2.0})


def test_a_restart_goes_on_with_what_was_measured() -> None:
    world, subject = World(experiment()), experiment()
    for i in range(30):
        assert world.route(f"u{i}")
    measured = world.live.measured("halve")
    assert measured is not None
    again = LiveExperiments(SALT, lambda: 1000.0)
    form = Measurements.from_json(measured.to_json())
    again.install([Running(subject, (subject.shares,), 900.0)], {"halve": form})
    found = again.measured("halve")
    assert found is not None
    assert found.phases[0].units.sampled() == world.units()
    # What goes on is kept; what has ended is forgotten.
    again.install([Running(subject, (subject.shares,), 900.0)])
    assert again.measured("halve") is found
    ended = again.route("m", {}, {"user": "u1"}, None, "r", LIVE)
    again.install([])
    assert again.measured("halve") is None
    assert ended is not None
    again.finished(ended, {"e2e_seconds": 1.0})


def test_answers_are_held_for_feedback_until_they_are_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("liveprune.server.experiments.live.MOST_ANSWERS", 2)
    world = World(experiment())
    found = world.route("u1")
    assert found is not None
    for name in ("a", "b", "a", "c"):
        world.live.answered(name, found)
    held = world.live.answers()
    assert held == {"a": found, "c": found}, "the oldest goes first"
    assert (world.live.answer("a"), world.live.answer("b")) == (found, None)
    later = world.route("u2")
    assert later is not None
    world.live.answered("c", later)
    world.live.forget_answers(held)
    assert world.live.answers() == {"c": later}, "given again since"


def test_the_variants_of_all_arms_are_needed() -> None:
    world = World(experiment())
    assert world.live.needed_variants() == {"full": "halve", "e4": "halve"}
    world.live.install([])
    assert world.live.needed_variants() == {}
