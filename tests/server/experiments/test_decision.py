from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiments.contrast import Contrast, MeanContrast, RateContrast, RatePhase
from liveprune.server.experiments.decision import Decision, decide, replay
from liveprune.server.experiments.definition import PPM, Experiment, experiment_from
from liveprune.server.experiments.findings import rollback_alpha, ship_alpha
from liveprune.server.experiments.measurements import Measurements
from liveprune.server.experiments.mismatch import UnitCounts
from liveprune.server.experiments.record import Record, record_from_json, record_of

EVEN = {"full": 500_000, "pruned": 500_000}


def experiment(**changes: Any) -> Experiment:
    return experiment_from(
        {
            "name": "halve",
            "model": "mixtral",
            "arms": [
                {"name": "full", "variant": "full", "weight": 0.5},
                {"name": "pruned", "variant": "e4", "weight": 0.5},
            ],
            "control": "full",
            "primary": {"metric": "e2e_seconds"},
            "guardrails": [
                {"metric": "loop", "margin": 0.02},
                {"metric": "score", "margin": 0.1, "relative": True},
            ],
            "minimum_units": 200,
            "rollback_units": 50,
            "minimum_seconds": 3600,
            "actions": ["notify", "rollback", "ramp", "promote"],
            **changes,
        }
    )


def mean(control: float, treatment: float, count: int = 1000, deviation: float = 1.0) -> Contrast:
    variance = deviation**2 / count
    return MeanContrast(
        count,
        count,
        control,
        treatment,
        variance,
        variance,
        0.0,
        variance,
        variance,
        2 * count,
        2000,
    )


def rate(control: float, treatment: float, count: int = 1000) -> Contrast:
    hits = control * count, treatment * count
    return RateContrast((RatePhase(count, hits[0], 1.0, count, hits[1], 1.0),))


GOOD: dict[str, Contrast | None] = {
    "e2e_seconds": mean(2.0, 1.0),
    "loop": rate(0.001, 0.001),
    "score": rate(0.8, 0.81),
}


def record(
    contrasts: dict[str, Contrast | None] | None = None,
    counts: tuple[int, int] = (1000, 1000),
    of: Experiment | None = None,
    **changes: Any,
) -> Record:
    of = of or experiment()
    units = {"full": counts[0], "pruned": counts[1]}
    found = Record(
        experiment=of,
        now=10_000.0,
        started=0.0,
        phase_started=0.0,
        last_action=None,
        shares=EVEN,
        units=units,
        unit_counts=(UnitCounts(units, EVEN),),
        earlier_mismatch_p=1.0,
        contrasts={"pruned": {**GOOD, **(contrasts or {})}},
    )
    return dataclasses.replace(found, **changes)


def states(decision: Decision) -> dict[str, str]:
    return {x.measure: x.state for x in decision.findings}


def test_ship_when_better_and_every_guardrail_within() -> None:
    found = decide(record())
    assert (found.verdict, found.arm) == ("SHIP", "pruned")
    assert states(found) == {"e2e_seconds": "better", "loop": "within", "score": "within"}
    assert found.actions == ("notify", "promote")
    assert found.reasons[0].startswith("e2e_seconds: better: 1 against 2, difference from -1.1")


def test_without_an_aim_it_ships_once_every_guardrail_holds() -> None:
    aimless = experiment(primary=None)
    found = decide(record(of=aimless))
    assert (found.verdict, found.arm) == ("SHIP", "pruned")
    assert states(found) == {"loop": "within", "score": "within"}
    unclear = decide(record({"score": rate(0.8, 0.75, 60)}, of=aimless))
    assert unclear.verdict == "HOLD"
    assert [reason.partition(":")[0] for reason in unclear.reasons] == ["pruned"]


@pytest.mark.parametrize(
    ("worse", "name"),
    [({"loop": rate(0.001, 0.2)}, "loop"), ({"score": rate(0.8, 0.5)}, "score")],
)
def test_rollback_beats_ship(worse: dict[str, Contrast | None], name: str) -> None:
    found = decide(record(worse))
    assert (found.verdict, found.arm) == ("ROLLBACK", "pruned")
    assert states(found)[name] == "worse"
    assert len(found.reasons) == 1
    assert found.actions == ("notify", "rollback")


def test_invalid_beats_rollback() -> None:
    found = decide(record({"loop": rate(0.001, 0.2)}, counts=(600, 400)))
    assert (found.verdict, found.arm, found.actions) == ("INVALID", None, ("notify",))
    assert "'full': 600, 'pruned': 400" in found.reasons[0]


def test_a_mismatch_once_seen_stays() -> None:
    assert decide(record(earlier_mismatch_p=0.001)).verdict == "INVALID"
    assert decide(record(earlier_mismatch_p=0.0011)).verdict == "SHIP"


def test_a_primary_that_is_worse_holds() -> None:
    found = decide(record({"e2e_seconds": mean(1.0, 2.0)}))
    assert found.verdict == "HOLD"
    assert states(found)["e2e_seconds"] == "worse"
    assert found.reasons[0].startswith("pruned: e2e_seconds: worse")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"now": 3599.0}, "3599 s of at least 3600 s have passed"),
        ({"units": {"full": 199, "pruned": 1000}}, "expected 200 of each"),
        ({"units": {"full": 1000}}, "expected 200 of each"),
    ],
)
def test_too_early_to_ship(changes: dict[str, Any], reason: str) -> None:
    found = decide(record(**changes))
    assert found.verdict == "HOLD"
    assert reason in found.reasons[0]


def test_a_metric_with_few_values_cannot_ship_though_units_are_many() -> None:
    found = decide(record({"e2e_seconds": mean(9.0, 1.0, count=199)}))
    assert found.verdict == "HOLD"
    assert "199 values, expected 200" in found.reasons[0]


@pytest.mark.parametrize("missing", ["e2e_seconds", "loop"])
def test_without_data_nothing_ships(missing: str) -> None:
    found = decide(record({missing: None}))
    assert found.verdict == "HOLD"
    assert found.reasons == (f"pruned: {missing}: nothing measured in both arms yet",)
    assert decide(dataclasses.replace(record(), contrasts={})).verdict == "HOLD"


def test_rollback_needs_fewer_units_and_no_time() -> None:
    bad = rate(0.0, 0.9, count=50)
    assert decide(record({"loop": bad}, counts=(50, 50), now=1.0)).verdict == "ROLLBACK"
    assert decide(record({"loop": bad}, counts=(49, 50), now=1.0)).verdict == "HOLD"


def test_a_relative_margin_scales_the_control_arm() -> None:
    """Score 0.8 may fall to 0.72: bounds are of treatment - 0.9 control, compared with 0."""
    for treatment, state in ((0.75, "within"), (0.72, "unclear"), (0.68, "worse")):
        found = decide(record({"score": rate(0.8, treatment, count=10_000)}))
        finding = next(x for x in found.findings if x.measure == "score")
        assert finding.state == state
        assert finding.limit == 0.0
        assert finding.lower is not None
        assert finding.upper is not None
        assert finding.lower < treatment - 0.9 * 0.8 < finding.upper


def test_alpha_is_divided_by_guardrails_and_arms() -> None:
    of = experiment(
        arms=[
            {"name": "full", "variant": "full", "weight": 0.5},
            {"name": "a", "variant": "e4", "weight": 0.25},
            {"name": "b", "variant": "e2", "weight": 0.25},
        ]
    )
    assert rollback_alpha(of) == pytest.approx(0.05 / 2 / 2)
    assert ship_alpha(of) == pytest.approx(0.05 / 2)
    assert rollback_alpha(experiment(guardrails=[])) == 0.05
    units = {"full": 1000, "a": 500, "b": 500}
    base = dataclasses.replace(
        record(of=of),
        shares=of.shares,
        units=units,
        unit_counts=(UnitCounts(units, of.shares),),
        contrasts={"a": GOOD, "b": {**GOOD, "e2e_seconds": mean(2.0, 0.5)}},
    )
    assert (decide(base).verdict, decide(base).arm) == ("SHIP", "b")
    bad = dataclasses.replace(base, contrasts={"a": GOOD, "b": {**GOOD, "loop": rate(0.0, 0.5)}})
    assert (decide(bad).verdict, decide(bad).arm) == ("ROLLBACK", "b")


def test_dry_run_says_what_it_would_do() -> None:
    found = decide(record(of=experiment(dry_run=True)))
    assert (found.actions, found.withheld) == ((), ("notify", "promote"))


def test_the_cool_down_holds_back_all_but_a_rollback() -> None:
    found = decide(record(last_action=9_500.0))
    assert (found.actions, found.withheld) == (("notify",), ("promote",))
    assert decide(record(last_action=9_400.0)).actions == ("notify", "promote")
    bad = decide(record({"loop": rate(0.0, 0.5)}, last_action=9_999.0))
    assert bad.actions == ("notify", "rollback")


def test_only_actions_that_were_asked_for() -> None:
    found = decide(record({"loop": rate(0.0, 0.5)}, of=experiment(actions=["notify"])))
    assert (found.verdict, found.actions, found.withheld) == ("ROLLBACK", ("notify",), ())


def test_ramps_go_on_while_nothing_looks_worse() -> None:
    of = experiment(ramp=[0.75, 1.0])
    unclear = {"e2e_seconds": mean(2.0, 2.0)}
    assert decide(record(unclear, of=of)).actions == ("ramp",)
    assert decide(record(of=of)).actions == ("notify", "ramp")
    assert decide(record(unclear, of=of, phase_started=9_000.0)).actions == ()
    assert decide(record({**unclear, "loop": rate(0.0, 0.03, count=60)}, of=of)).actions == ()
    assert decide(record({**unclear, "loop": rate(0.0, 0.01, count=60)}, of=of)).actions == (
        "ramp",
    )
    last = {"full": 0, "pruned": PPM}
    assert decide(record(of=of, shares=last)).actions == ("notify", "promote")


def filled(seed: int = 1, units: int = 120) -> Measurements:
    rng = np.random.default_rng(seed)
    found = Measurements()
    for phase in range(2):
        found.begin(EVEN)
        for i in range(units):
            unit, arm = int(rng.integers(2**63)), ("full", "pruned")[i % 2]
            found.assigned(phase, unit, arm)
            values = {"e2e_seconds": float(rng.exponential()), "loop": 0.0}
            found.finished(phase, unit, arm, values)
    return found


def made(of: Experiment) -> Record:
    return record_of(of, filled(), now=9e3, started=0.0, phase_started=1e3, last_action=5.0)


def test_a_record_replays_to_the_same_decision() -> None:
    of = experiment(primary={"metric": "e2e_seconds", "statistic": "p90"})
    before = made(of)
    form = json.loads(json.dumps(before.to_json(), allow_nan=False))
    assert record_from_json(form) == before
    assert replay(form) == decide(before)
    assert json.loads(json.dumps(decide(before).to_json(), allow_nan=False))["verdict"] == "HOLD"
    assert before.units == {"full": 120, "pruned": 120}
    assert before.contrasts["pruned"]["score"] is None


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.01, 5), st.floats(0.01, 5), st.floats(0, 1), st.floats(0, 1), st.integers(1, 5000)
)
def test_any_record_replays(a: float, b: float, p: float, q: float, count: int) -> None:
    of = experiment(guardrails=[{"metric": "loop", "margin": 0.01}])
    before = record({"e2e_seconds": mean(a, b, count), "loop": rate(p, q, count)}, of=of)
    assert replay(json.loads(json.dumps(before.to_json(), allow_nan=False))) == decide(before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 9}, "version: found 9"),
        ({"units": {"full": -1}}, "units: full: found -1"),
        ({"contrasts": {"pruned": 1}}, "contrasts: pruned"),
        ({"last_action": "now"}, "last_action: found 'now'"),
        ({"extra": 1}, "unknown field extra"),
    ],
)
def test_malformed_records_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ExperimentError, match=reason):
        record_from_json(made(experiment()).to_json() | change)


def test_no_phase_no_record() -> None:
    with pytest.raises(ExperimentError, match="found no phase"):
        record_of(experiment(), Measurements(), now=1.0, started=0.0, phase_started=0.0)


def simulated(
    seed: int, runs: int, looks: list[int], treatment: float, harm: float, share: float = 0.5
) -> Counter[str]:
    """First verdict but HOLD of each run: means of units, looked at again and again.

    ``treatment`` and ``harm`` are the true differences of the primary and of a guardrail whose
    margin is 0.2, in standard deviations; ``share`` is what the treatment arm truly gets of half.
    """
    of = experiment(
        guardrails=[{"metric": "kl", "margin": 0.2}], minimum_seconds=0, minimum_units=100
    )
    found: Counter[str] = Counter()
    for run in range(runs):
        rng = np.random.default_rng([seed, run])
        arm = rng.random(looks[-1]) < share
        values = rng.exponential(1.0, (2, looks[-1])) + np.outer((treatment, harm), arm)
        totals = [[(np.cumsum(v * on), np.cumsum(v**2 * on)) for on in (~arm, arm)] for v in values]
        sizes = [np.cumsum(on) for on in (~arm, arm)]
        verdict = "HOLD"
        for n in looks:
            a, b = (int(size[n - 1]) for size in sizes)
            contrasts: dict[str, Contrast | None] = {}
            for label, arms in zip(("e2e_seconds", "kl"), totals, strict=True):
                means = [float(s[n - 1]) / k for (s, _), k in zip(arms, (a, b), strict=True)]
                spread = [
                    (float(s2[n - 1]) / k - m * m) / (k - 1)
                    for (_, s2), k, m in zip(arms, (a, b), means, strict=True)
                ]
                contrasts[label] = MeanContrast(
                    a, b, *means, *spread, 0.0, *spread, 4 / (1 / a + 1 / b), 2000
                )
            verdict = decide(record(contrasts, counts=(a, b), of=of)).verdict
            if verdict != "HOLD":
                break
        found[verdict] += 1
    return found


LOOKS = [120, 150, 200, 250, 300, 400, 500, 650, 800, 1000, 1300, 1600, 2000]


def test_a_a_runs_ship_roll_back_and_invalidate_rarely() -> None:
    """1,000 runs without any difference, in the margin's middle."""
    found = simulated(50, 1000, LOOKS, treatment=0.0, harm=0.0)
    assert found["SHIP"] <= 50
    assert found["ROLLBACK"] <= 5
    assert found["INVALID"] <= 1


def test_harm_at_the_margin_rarely_ships_or_rolls_back() -> None:
    """The worst cases at once: really better, and the guardrail exactly at its margin."""
    found = simulated(51, 400, LOOKS, treatment=-0.5, harm=0.2)
    assert found["SHIP"] <= 20
    assert found["ROLLBACK"] <= 20


def test_what_is_there_is_found() -> None:
    assert simulated(52, 50, LOOKS, treatment=-0.5, harm=0.0)["SHIP"] >= 45
    assert simulated(53, 50, LOOKS, treatment=-0.5, harm=0.7)["ROLLBACK"] >= 48
    # Four in ten under half and half: never SHIP, though the arm is truly better.
    assert simulated(54, 50, LOOKS[-2:], treatment=-0.5, harm=0.0, share=0.4)["INVALID"] >= 49
