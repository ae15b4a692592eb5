from __future__ import annotations

import json

import numpy as np
import pytest

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiments.contrast import (
    MeanContrast,
    QuantileContrast,
    RateContrast,
    contrast_from_json,
    contrast_to_json,
)
from liveprune.server.experiments.measurements import Measurements
from liveprune.server.experiments.metrics import Measure
from liveprune.server.experiments.sequences import one_sided_radius, prior_variance, rank_interval
from liveprune.server.experiments.summary import contrast_of, inflation, units_by_arm
from liveprune.server.experiments.units import BUCKETS

ALPHA = 0.05
MEAN = Measure("e2e_seconds")
P90 = Measure("e2e_seconds", "p90")
LOOP = Measure("loop")


def measured(
    rng: np.random.Generator, sizes: list[tuple[int, int]], repeats: int = 1
) -> tuple[Measurements, list[list[list[float]]]]:
    """Phases with so many units in A and B; each sends ``repeats`` like requests."""
    found = Measurements()
    values: list[list[list[float]]] = []
    for phase, both in enumerate(sizes):
        found.begin({"A": 500_000, "B": 500_000})
        values.append([[], []])
        for arm, size in enumerate(both):
            for _ in range(size):
                unit = int(rng.integers(2**63))
                found.assigned(phase, unit, "AB"[arm])
                value = float(rng.exponential(1 + 0.2 * phase))
                for _ in range(repeats):
                    loop = float(value > 2)
                    found.finished(phase, unit, "AB"[arm], {"e2e_seconds": value, "loop": loop})
                    values[phase][arm].append(value)
    return found, values


def contrast(found: Measurements, measure: Measure) -> MeanContrast:
    made = contrast_of(found, measure, "A", "B", 1000, [ALPHA])
    assert isinstance(made, MeanContrast)
    return made


def test_means_of_phases_are_weighted_by_mantel_and_haenszel() -> None:
    found, values = measured(np.random.default_rng(40), [(90, 10), (40, 60)])
    made = contrast(found, MEAN)
    weights = [90 * 10 / 100, 40 * 60 / 100]
    means = [[np.mean(arm) for arm in phase] for phase in values]
    total = sum(weights)
    for arm, name in enumerate(("control", "treatment")):
        expected = sum(w * m[arm] for w, m in zip(weights, means, strict=True)) / total
        assert getattr(made, name) == pytest.approx(expected)
        expected = sum(
            (w / total) ** 2 * np.var(phase[arm], ddof=1) / len(phase[arm])
            for w, phase in zip(weights, values, strict=True)
        )
        assert getattr(made, f"{name}_independent") == pytest.approx(expected)
    assert (made.control_count, made.treatment_count) == (130, 70)
    assert made.units == pytest.approx(4 / (1 / 130 + 1 / 70))


def test_a_mean_bound_is_estimate_and_radius() -> None:
    made = MeanContrast(100, 100, 2.0, 3.0, 0.04, 0.09, 0.01, 0.03, 0.05, 200.0, 1000)
    variance = 0.09 + 1.1**2 * 0.04 - 2 * 1.1 * 0.01
    prior = prior_variance(variance, 200.0, 1000, ALPHA)
    radius = one_sided_radius(variance, prior, ALPHA)
    assert made.bound("lower", 1.1, ALPHA) == pytest.approx(3.0 - 2.2 - radius)
    assert made.bound("upper", 1.1, ALPHA) == pytest.approx(3.0 - 2.2 + radius)


def test_fewer_than_independent_variance_is_never_believed() -> None:
    made = MeanContrast(9, 9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 18.0, 1000)
    radius = one_sided_radius(1.0, prior_variance(1.0, 18.0, 1000, ALPHA), ALPHA)
    assert made.bound("upper", 1.0, ALPHA) == pytest.approx(radius)


def test_repeated_requests_of_a_unit_prove_nothing_more() -> None:
    """Each unit says the same ten times: bounds are about those of the units said once."""
    once, _ = measured(np.random.default_rng(41), [(400, 400)])
    often, _ = measured(np.random.default_rng(41), [(400, 400)], repeats=10)
    for measure, low in ((MEAN, 0.8), (LOOP, 0.8)):
        width = []
        for found in (once, often):
            made = contrast_of(found, measure, "A", "B", 800, [ALPHA])
            assert made is not None
            ends = [made.bound(side, 1.0, ALPHA) for side in ("lower", "upper")]
            assert ends[0] is not None
            assert ends[1] is not None
            width.append(ends[1] - ends[0])
        assert low < width[1] / width[0] < 1.25
    assert inflation(often.phases[0].cells["A"]["e2e_seconds"]) == pytest.approx(10, rel=0.35)


def test_rate_contrast_keeps_phases_apart() -> None:
    found, values = measured(np.random.default_rng(42), [(90, 10), (40, 60)])
    made = contrast_of(found, LOOP, "A", "B", 1000, [ALPHA])
    assert isinstance(made, RateContrast)
    hits = [[sum(x > 2 for x in arm) for arm in phase] for phase in values]
    assert [(x.control_hits, x.treatment_hits) for x in made.phases] == [tuple(x) for x in hits]
    assert made.control == sum(x[0] for x in hits) / 130
    assert made.estimate() == pytest.approx(
        (9 * (hits[0][1] / 10 - hits[0][0] / 90) + 24 * (hits[1][1] / 60 - hits[1][0] / 40)) / 33
    )


def test_quantile_bounds_are_order_statistics() -> None:
    found, values = measured(np.random.default_rng(43), [(300, 200)])
    made = contrast_of(found, P90, "A", "B", 1000, [ALPHA, 0.01])
    assert isinstance(made, QuantileContrast)
    spent = ALPHA / 2 / 2  # the first phase's half, and half of that for each arm
    ends = []
    for arm, name in enumerate("AB"):
        cell = found.phases[0].cells[name]["e2e_seconds"]
        values[0][arm].sort()
        low, high = rank_interval(len(values[0][arm]), 0.9, spent, 500, inflation(cell))
        ends.append((values[0][arm][low - 1], values[0][arm][high - 1]))
    exact = {"lower": ends[1][0] - 1.1 * ends[0][1], "upper": ends[1][1] - 1.1 * ends[0][0]}
    slack = 0.02 * (ends[0][1] + ends[1][1]) * 1.1
    lower, upper = (made.bound(side, 1.1, ALPHA) for side in ("lower", "upper"))
    assert lower is not None
    assert upper is not None
    assert exact["lower"] - slack <= lower <= exact["lower"]
    assert exact["upper"] <= upper <= exact["upper"] + slack
    assert made.control == pytest.approx(values[0][0][269], rel=0.01)
    with pytest.raises(ExperimentError, match=r"expected one at 0\.2"):
        made.bound("lower", 1.0, 0.2)


def test_the_tightest_phase_bounds_a_quantile() -> None:
    one, _ = measured(np.random.default_rng(44), [(5, 5)])
    two, _ = measured(np.random.default_rng(44), [(5, 5), (500, 500)])
    few = contrast_of(one, P90, "A", "B", 1000, [ALPHA])
    many = contrast_of(two, P90, "A", "B", 1000, [ALPHA])
    assert few is not None
    assert many is not None
    assert few.bound("upper", 1.0, ALPHA) is None
    assert many.bound("upper", 1.0, ALPHA) is not None


def test_nothing_to_compare() -> None:
    found, _ = measured(np.random.default_rng(45), [(5, 0)])
    assert contrast_of(found, MEAN, "A", "B", 1000, [ALPHA]) is None
    assert contrast_of(Measurements(), MEAN, "A", "B", 1000, [ALPHA]) is None
    assert units_by_arm(found) == {"A": 5}


@pytest.mark.parametrize("measure", [MEAN, P90, LOOP])
def test_json_round_trip(measure: Measure) -> None:
    found, _ = measured(np.random.default_rng(46), [(20, 20), (3, 4)])
    made = contrast_of(found, measure, "A", "B", 1000, [ALPHA])
    assert made is not None
    back = contrast_from_json(json.loads(json.dumps(contrast_to_json(made), allow_nan=False)))
    assert back == made


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"kind": "median"}, "kind: found 'median'"),
        ({"kind": "mean"}, "control_count: found None"),
        ({"kind": "rate", "phases": [1]}, "expected an object"),
        ({"kind": "quantile", "phases": [{"intervals": [[1, 2]]}]}, "expected five numbers"),
    ],
)
def test_malformed_forms_are_refused(form: object, reason: str) -> None:
    with pytest.raises(ExperimentError, match=reason):
        contrast_from_json(form)


def test_repeating_units_raise_few_false_alarms_at_every_look() -> None:
    """400 A/A runs of 300 units an arm whose requests are alike, looked at every 60 requests.

    As in ``MeanContrast``, vectorised over runs: variance from sums per class of units. Treating
    requests as independent would be wrong in most runs.
    """
    rng = np.random.default_rng(47)
    runs, units, looks, block = 400, 300, 100, 60
    effect = rng.normal(0, 1, (2, runs, units))
    classes = rng.integers(0, BUCKETS, (2, runs, units))
    sums, counts = np.zeros((2, runs, BUCKETS)), np.zeros((2, runs, BUCKETS))
    squares = np.zeros((2, runs))
    clustered, naive = np.zeros(runs, bool), np.zeros(runs, bool)
    arms, rows = np.arange(2)[:, None, None], np.arange(runs)[None, :, None]
    seen = np.zeros((2, runs, units), bool)
    for _ in range(looks):
        who = rng.integers(0, units, (2, runs, block))
        values = effect[arms, rows, who] + rng.normal(0, 0.5, who.shape)
        seen[arms, rows, who] = True
        np.add.at(sums, (arms, rows, classes[arms, rows, who]), values)
        np.add.at(counts, (arms, rows, classes[arms, rows, who]), 1)
        squares += (values**2).sum(-1)
        n = counts.sum(-1)
        mean = sums.sum(-1) / n
        scores = (sums - mean[..., None] * counts) / n[..., None]
        independent = ((squares / n - mean**2) / (n - 1)).sum(0)
        grouped = (scores**2).sum((0, 2)) * BUCKETS / (BUCKETS - 1)
        variance = np.maximum(grouped, independent)
        difference = mean[1] - mean[0]
        known = seen.sum((0, 2))
        prior = prior_variance(variance, known, 1000, ALPHA)
        clustered |= difference > one_sided_radius(variance, prior, ALPHA)
        prior = prior_variance(independent, n.sum(0), 1000, ALPHA)
        naive |= difference > one_sided_radius(independent, prior, ALPHA)
    assert clustered.mean() <= ALPHA
    assert naive.mean() > 4 * ALPHA
