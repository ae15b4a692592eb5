from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiments.definition import (
    PPM,
    UNIT_CHAIN,
    Experiment,
    check_exclusive,
    experiment_from,
)
from liveprune.server.experiments.metrics import METRICS, Measure, check_value


def form(**changes: Any) -> dict[str, Any]:
    return {
        "name": "halve",
        "model": "mixtral",
        "arms": [
            {"name": "full", "variant": "full", "weight": 0.9},
            {"name": "pruned", "variant": "e4k1", "weight": 0.1},
        ],
        "control": "full",
        "primary": {"metric": "e2e_seconds", "statistic": "p95"},
        "guardrails": [
            {"metric": "loop", "margin": 0.01},
            {"metric": "ttft_seconds", "statistic": "p95", "margin": 0.05, "relative": True},
        ],
        **changes,
    }


def test_reads_the_fields_and_fills_the_rest() -> None:
    found = experiment_from(form(ramp=[0.25, 0.5], actions=["promote", "notify"]))
    assert [(arm.name, arm.variant, arm.ppm) for arm in found.arms] == [
        ("full", "full", 900_000),
        ("pruned", "e4k1", 100_000),
    ]
    assert found.primary == Measure("e2e_seconds", "p95", "lower")
    assert found.primary.quantile == 0.95
    assert [x.label for x in found.guardrails] == ["loop", "ttft_seconds p95"]
    assert found.guardrails[1].relative
    assert not found.guardrails[0].relative
    assert found.unit == UNIT_CHAIN
    assert found.ramp == (250_000, 500_000)
    assert found.actions == ("notify", "promote")
    assert (found.alpha, found.srm_alpha, found.dry_run) == (0.05, 0.001, False)


def test_json_round_trip() -> None:
    found = experiment_from(
        form(
            start="2026-01-31T08:00:00+00:00",
            end=1_800_000_000,
            traffic=[0.25, 0.5],
            ramp=[0.5],
            dry_run=True,
            unit=["header:x-tenant", "request-id"],
            fidelity=0.1,
            arms=[
                {"name": "full", "variant": "full", "weight": 0.9},
                {"name": "pruned", "variant": "e4k1", "weight": 0.1, "shadow": True},
            ],
        )
    )
    assert [arm.shadow for arm in found.arms] == [False, True]
    assert found.fidelity == 0.1
    assert found.start == 1_769_846_400.0
    assert experiment_from(json.loads(json.dumps(found.to_json()))) == found
    aimless = experiment_from(form(primary=None))
    assert aimless.primary is None
    assert experiment_from(json.loads(json.dumps(aimless.to_json()))) == aimless


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=7))
def test_shares_are_millionths_that_sum_to_one(parts: list[int]) -> None:
    arms = [
        {"name": f"a{i}", "variant": f"v{i}", "weight": part / sum(parts)}
        for i, part in enumerate(parts)
    ]
    found = experiment_from(form(arms=arms, control="a0"))
    assert sum(found.shares.values()) == PPM
    for arm, part in zip(found.arms, parts, strict=True):
        assert abs(arm.ppm - PPM * part / sum(parts)) < 1
    assert sum(found.ramped(777_777).values()) == PPM
    assert found.ramped(777_777)["a0"] == PPM - 777_777


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nmae": 1}, "unknown field nmae"),
        ({"name": "no spaces"}, "name: found 'no spaces'"),
        ({"model": ""}, "model: found ''"),
        ({"arms": []}, "arms: found 0, expected at least two arms"),
        ({"control": "ful"}, "control: found 'ful', expected one of full, pruned"),
        ({"primary": {"metric": "latency"}}, "primary: metric: found 'latency', expected one of"),
        ({"primary": {"metric": "loop", "statistic": "p95"}}, "quantiles are kept of"),
        ({"primary": {"metric": "e2e_seconds", "statistic": "p0"}}, "lie above p0"),
        (
            {"primary": {"metric": "e2e_seconds", "better": "more"}},
            "found 'more', expected 'lower'",
        ),
        ({"guardrails": [{"metric": "loop"}]}, "guardrail 1: margin: found None"),
        ({"guardrails": [{"metric": "loop", "margin": -1}]}, "of at least 0"),
        ({"guardrails": [{"metric": "loop", "margin": 0.1}] * 2}, "loop 2 times"),
        ({"alpha": float("nan")}, "alpha: found nan"),
        ({"alpha": True}, "alpha: found True"),
        ({"minimum_units": 1.5}, "minimum_units: found 1.5, expected a whole number"),
        ({"traffic": [0.5, 0.5]}, "traffic: found"),
        ({"traffic": [0, "1"]}, "traffic: found"),
        ({"ramp": [0.05]}, "rise from the arms' 0.1"),
        ({"ramp": [0.5, float("nan")]}, "ramp: found"),
        ({"ramp": [0.5, 1.5]}, "ramp: found"),
        ({"unit": ["api-key"]}, "ends in 'request-id'"),
        ({"unit": ["cookie:x", "request-id"]}, "unit: found 'cookie:x'"),
        ({"actions": ["explode"]}, "actions: found 'explode'"),
        ({"start": "2026-01-31T08:00:00"}, "start: found"),
        ({"start": 10, "end": 10}, "end: found 10"),
        ({"primary": None, "guardrails": []}, "primary: found None, expected a measure, or guard"),
        ({"fidelity": 1.1}, "fidelity: found 1.1"),
        (
            {
                "arms": [
                    {"name": "full", "variant": "full", "weight": 0.9, "shadow": True},
                    {"name": "pruned", "variant": "e4k1", "weight": 0.1},
                ]
            },
            "the control arm full as a shadow",
        ),
        ({"dry_run": "yes"}, "dry_run: found 'yes', expected true or false"),
    ],
)
def test_errors_name_the_field(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        experiment_from(form(**changes))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ((0.9, 0.2), "sum to 1.1"),
        ((1.0, 0.0), "no weight outside the control"),
        ((1.1, -0.1), "from 0 to 1"),
    ],
)
def test_bad_weights(weights: tuple[float, float], reason: str) -> None:
    arms = [
        {"name": name, "variant": name, "weight": weight}
        for name, weight in zip(("full", "pruned"), weights, strict=True)
    ]
    with pytest.raises(ExperimentError, match=reason):
        experiment_from(form(arms=arms))


def test_not_an_object() -> None:
    with pytest.raises(ExperimentError, match="expected an object"):
        experiment_from([1])


def layered(name: str, traffic: list[float], model: str = "mixtral") -> Experiment:
    return experiment_from(form(name=name, traffic=traffic, model=model))


def test_experiments_on_one_alias_exclude_each_other() -> None:
    check_exclusive(
        [layered("a", [0, 0.5]), layered("b", [0.5, 1]), layered("c", [0, 1], model="qwen")]
    )
    with pytest.raises(ExperimentError, match=r"experiment b: traffic: found \[0.4, 1\) .* a owns"):
        check_exclusive([layered("a", [0, 0.5]), layered("b", [0.4, 1])])
    other = experiment_from(form(name="b", traffic=[0.5, 1], unit=["api-key", "request-id"]))
    with pytest.raises(ExperimentError, match="unit: found api-key, request-id, expected that of"):
        check_exclusive([layered("a", [0, 0.5]), other])


@pytest.mark.parametrize(
    ("metric", "value"),
    [("loop", 1.5), ("loop", -0.1), ("ttft_seconds", -1.0), ("kl", float("inf")), ("speed", 1.0)],
)
def test_impossible_values_are_refused(metric: str, value: float) -> None:
    with pytest.raises(ExperimentError, match=metric):
        check_value(metric, value)


def test_possible_values_pass() -> None:
    assert check_value("log_likelihood_gap", -2.0) == -2.0
    assert all(check_value(name, 0.5) == 0.5 for name in METRICS)
