"""From units to a decision: assignment, measurement on two replicas, a ramp, records."""

from __future__ import annotations

import json

import numpy as np

from liveprune.server.experiments.assignment import Allocation, allocate, assign, unit_of
from liveprune.server.experiments.decision import Decision, decide, replay
from liveprune.server.experiments.definition import Experiment, experiment_from
from liveprune.server.experiments.measurements import Measurements
from liveprune.server.experiments.record import record_of
from liveprune.server.experiments.units import unit_hash

SALT = b"a secret of the server"


def experiment() -> Experiment:
    return experiment_from(
        {
            "name": "halve",
            "model": "mixtral",
            "arms": [
                {"name": "full", "variant": "full", "weight": 0.9},
                {"name": "pruned", "variant": "e4k1", "weight": 0.1},
            ],
            "control": "full",
            "primary": {"metric": "e2e_seconds", "statistic": "p50"},
            "guardrails": [
                {"metric": "loop", "margin": 0.05},
                {"metric": "output_tokens", "margin": 0.2, "relative": True},
            ],
            "ramp": [0.5],
            "actions": ["notify", "rollback", "ramp", "promote"],
            "minimum_seconds": 100,
            "cool_down_seconds": 0,
        }
    )


class World:
    """Traffic of 3,000 users to two replicas; ``loops``: how often the pruned model loops."""

    def __init__(self, loops: float) -> None:
        self.experiment = experiment()
        self.history = [self.experiment.shares]
        self.replicas = [Measurements(), Measurements()]
        self.rng = np.random.default_rng(60)
        self.loops = {"full": 0.005, "pruned": loops}
        self.arms: list[dict[str, str]] = []
        """Of each phase: unit to arm."""
        self.begin()

    def begin(self) -> Allocation:
        for replica in self.replicas:
            replica.begin(self.history[-1])
        self.arms.append({})
        return allocate(self.history)

    def serve(self, requests: int) -> None:
        running = [(self.experiment, allocate(self.history))]
        for _ in range(requests):
            user = f"user-{self.rng.integers(3000)}"
            unit = unit_of(self.experiment.unit, {}, {"user": user}, None, "r")
            found = assign(SALT, running, "mixtral", unit)
            assert found is not None
            arm = found[1]
            assert self.arms[-1].setdefault(unit, arm) == arm
            replica = self.replicas[int(self.rng.integers(2))]
            number = unit_hash(SALT, "halve", unit)
            phase = len(self.history) - 1
            replica.assigned(phase, number, arm)
            values = {
                "e2e_seconds": float(self.rng.lognormal(-0.5 * (arm == "pruned"), 0.5)),
                "loop": float(self.rng.random() < self.loops[arm]),
                "output_tokens": float(self.rng.integers(50, 150)),
            }
            replica.finished(phase, number, arm, values)

    def decide(self, now: float) -> Decision:
        whole = Measurements.from_json(json.loads(json.dumps(self.replicas[0].to_json())))
        whole.merge(self.replicas[1])
        record = record_of(
            self.experiment, whole, now=now, started=0.0, phase_started=now - 150 if now else 0.0
        )
        found = decide(record)
        assert replay(json.loads(json.dumps(record.to_json(), allow_nan=False))) == found
        return found


def test_a_good_variant_is_ramped_and_shipped() -> None:
    world = World(loops=0.005)
    world.serve(2500)
    first = world.decide(200.0)
    assert first.verdict == "HOLD"
    assert first.actions == ("ramp",)
    world.history.append(world.experiment.ramped(world.experiment.ramp[0]))
    world.begin()
    world.serve(5000)
    both = world.arms[0].keys() & world.arms[1].keys()
    assert all(world.arms[1][u] == "pruned" for u in both if world.arms[0][u] == "pruned")
    assert any(world.arms[1][u] == "pruned" for u in both if world.arms[0][u] == "full")
    last = world.decide(400.0)
    assert (last.verdict, last.arm, last.actions) == ("SHIP", "pruned", ("notify", "promote"))
    assert last.mismatch_p > 0.001


def test_a_bad_variant_is_rolled_back_long_before_the_minimum_time() -> None:
    world = World(loops=0.5)
    world.serve(1000)
    found = world.decide(1.0)
    assert (found.verdict, found.arm, found.actions) == (
        "ROLLBACK",
        "pruned",
        ("notify", "rollback"),
    )
    assert found.reasons[0].startswith("loop: worse")


def test_an_arm_that_loses_units_is_invalid() -> None:
    world = World(loops=0.005)
    world.serve(2500)
    for replica in world.replicas:
        sample = replica.phases[0].units
        kept = {u: arm for u, arm in sample.arms.items() if arm == "full" or u % 2}
        sample.arms = kept
    assert world.decide(200.0).verdict == "INVALID"
