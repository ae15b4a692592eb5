from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from liveprune.pruning.errors import StoreError
from liveprune.server.experiment_metrics import experiment_metrics
from liveprune.server.experiment_models import ExperimentBody
from liveprune.server.live_metrics import LiveMetrics
from tests.server.fake_control import FakeControl
from tests.server.full_metrics import arm, decision, experiment, finding

Series = dict[tuple[str, ...], float]


def series(*bodies: ExperimentBody, model: str | None = "tiny") -> dict[str, Series]:
    """By name without the prefix, then by the labels' values without the model."""
    found: dict[str, Series] = {}
    for family in experiment_metrics(model, bodies):
        of = found.setdefault(family.name.removeprefix("liveprune_"), {})
        for sample in family.samples:
            assert sample.labels["model"] == "tiny"
            labels = tuple(sample.labels.values())[1:]
            assert labels not in of
            of[labels] = sample.value
    return found


def test_arms() -> None:
    arms = [arm("full", 0.75, units=90, requests=180), arm("pruned", 0.25, units=30, requests=61)]
    found = series(experiment("x", arms=arms))
    assert found["experiment_share_ratio"] == {("x", "full"): 0.75, ("x", "pruned"): 0.25}
    assert found["experiment_units"] == {("x", "full"): 90, ("x", "pruned"): 30}
    assert found["experiment_requests"] == {("x", "full"): 180, ("x", "pruned"): 61}


@pytest.mark.parametrize("verdict", ["INVALID", "ROLLBACK", "SHIP", "HOLD"])
def test_one_verdict_is_present(verdict: str) -> None:
    found = series(experiment("x", decision=decision(verdict, p=0.125)))
    expected = {("x", name): 0.0 for name in ("INVALID", "ROLLBACK", "SHIP", "HOLD")}
    assert found["experiment_verdict"] == {**expected, ("x", verdict): 1}
    assert found["experiment_srm_pvalue"] == {("x",): 0.125}


def test_before_the_first_decision() -> None:
    found = series(experiment("x"))
    assert set(found["experiment_verdict"].values()) == {0}
    for name in ("srm_pvalue", "difference", "difference_limit"):
        assert found[f"experiment_{name}"] == {}


def test_differences_lie_between_their_bounds() -> None:
    """Also under a relative margin, by which the control arm's value is multiplied first."""
    found = series(
        experiment(
            "x",
            decision=decision(
                "HOLD",
                finding("e2e_seconds p95", "primary", control=2.0, treatment=1.5),
                finding("e2e_seconds p95", "guardrail", control=2.0, treatment=1.5, upper=None),
                finding("loop", "guardrail", control=0.5, treatment=0.75, lower=None, limit=0.01),
                finding("score", "guardrail", control=0.5, treatment=0.75),
            ),
        )
    )
    at = {
        "primary": ("x", "pruned", "e2e_seconds p95", "primary"),
        "slow": ("x", "pruned", "e2e_seconds p95", "guardrail"),
        "loop": ("x", "pruned", "loop", "guardrail"),
        "score": ("x", "pruned", "score", "guardrail"),
    }
    assert found["experiment_difference"] == {
        at["primary"]: -0.5,
        at["slow"]: pytest.approx(1.5 - 2.0 * 1.1),
        at["loop"]: 0.25,
        at["score"]: pytest.approx(0.75 - 0.5 * 0.95),
    }
    lower = {at["primary"]: -0.75, at["slow"]: -0.75, at["score"]: -0.75}
    assert found["experiment_difference_lower"] == lower
    upper = {at["primary"]: 0.25, at["loop"]: 0.25, at["score"]: 0.25}
    assert found["experiment_difference_upper"] == upper
    assert found["experiment_difference_limit"] == {
        **dict.fromkeys(at.values(), 0.0),
        at["loop"]: 0.01,
    }


def test_nothing_measured_yet_has_a_limit_only() -> None:
    empty = dict.fromkeys(("control", "treatment", "lower", "upper"))
    found = series(
        experiment("x", decision=decision("HOLD", finding("loop", "guardrail", **empty, limit=0.5)))
    )
    assert found["experiment_difference"] == {}
    assert list(found["experiment_difference_limit"].values()) == [0.5]


def test_paused() -> None:
    found = series(experiment("x", paused="not live here: e4"), experiment("y"))
    assert found["experiment_paused"] == {("x",): 1, ("y",): 0}


@pytest.mark.parametrize("state", ["scheduled", "stopped", "shipped", "rolled_back"])
def test_only_running_ones_have_series_of_their_own(state: str) -> None:
    ended = None if state == "scheduled" else 990.0
    body = experiment("x", state=state, ended=ended, decision=decision("SHIP"))
    found = series(body, experiment("y", state="stopped", ended=980.0))
    own = {name: values for name, values in found.items() if not name.startswith("experiments")}
    assert len(own) == 10
    assert not any(own.values())


def test_how_many_and_when_they_ended() -> None:
    found = series(
        experiment("a"),
        experiment("b", state="rolled_back", ended=990.0),
        experiment("c", state="rolled_back", ended=995.0),
        experiment("d", state="shipped", ended=970.0),
    )
    assert found["experiments"] == {
        ("scheduled",): 0,
        ("running",): 1,
        ("stopped",): 0,
        ("shipped",): 1,
        ("rolled_back",): 2,
    }
    assert found["experiments_last_end_timestamp_seconds"] == {
        ("shipped",): 970,
        ("rolled_back",): 995,
    }


def test_without_a_model_there_are_no_samples() -> None:
    found = series(experiment(decision=decision("HOLD")), model=None)
    assert not any(found.values())


def test_the_page_asks_each_time_and_survives_a_store_that_fails() -> None:
    answers: list[Sequence[ExperimentBody] | StoreError] = [
        [experiment("x")],
        StoreError("gone"),
        [],
    ]

    async def ask() -> Sequence[ExperimentBody]:
        found = answers.pop(0)
        if isinstance(found, StoreError):
            raise found
        return found

    metrics = LiveMetrics(FakeControl(), experiments=ask)

    def page() -> str:
        asyncio.run(metrics.refresh())
        return metrics.page("")[0].decode()

    assert 'liveprune_experiment_paused{experiment="x",model="tiny"} 0.0' in page()
    failed = page()
    assert 'experiment="x"' not in failed
    assert "liveprune_variant_info{" in failed
    assert 'experiment="x"' not in page()
