from __future__ import annotations

import json
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiments.measurements import Measurements
from liveprune.server.experiments.moments import Moments
from liveprune.server.experiments.sketch import ACCURACY, Sketch
from liveprune.server.experiments.units import (
    BUCKETS,
    ClusterSums,
    UnitSample,
    covariance,
    distinct_units,
    unit_hash,
)

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


def moments(values: list[float]) -> Moments:
    found = Moments()
    for value in values:
        found.add(value)
    return found


@given(numbers, numbers)
def test_merged_moments_are_those_of_both_streams(a: list[float], b: list[float]) -> None:
    found = moments(a)
    found.merge(moments(b))
    assert found.count == len(a + b)
    scale = max(1.0, *(abs(x) for x in a + b))
    assert found.mean == pytest.approx(statistics.fmean(a + b), abs=1e-9 * scale)
    assert found.variance == pytest.approx(statistics.variance(a + b), abs=1e-9 * scale**2)


def test_moments_survive_a_large_offset() -> None:
    found = moments([1e9 + x for x in (4, 7, 13, 16)])
    assert found.variance == pytest.approx(30)
    assert Moments.from_json(json.loads(json.dumps(found.to_json()))) == found
    empty = Moments()
    empty.merge(Moments())
    assert (empty.count, empty.variance) == (0, 0.0)


def sketch(values: list[float]) -> Sketch:
    found = Sketch()
    for value in values:
        found.add(value)
    return found


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.data())
def test_every_rank_is_within_one_per_cent(values: list[float], data: st.DataObject[int]) -> None:
    rank = data.draw(st.integers(1, len(values)))
    exact = sorted(values)[rank - 1]
    assert sketch(values).value_at(rank) == pytest.approx(exact, rel=1.001 * ACCURACY, abs=1e-6)


def test_a_merged_sketch_is_that_of_both_streams() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(size=500).tolist(), rng.lognormal(1.0, size=300).tolist()
    merged, whole = sketch(a), sketch(a + b)
    merged.merge(sketch(b))
    back = Sketch.from_json(json.loads(json.dumps(merged.to_json())))
    for rank in (1, 2, 399, 400, 401, 760, 800):
        assert merged.value_at(rank) == whole.value_at(rank)
        assert back.value_at(rank) == pytest.approx(whole.value_at(rank), rel=1e-9)
    assert back.count == merged.count == 800
    back.merge(sketch(a))
    assert back.count == 1300


def test_quantile_is_the_smallest_value_with_enough_below() -> None:
    found = sketch([float(i) for i in range(1, 21)])
    for level, exact in ((0.05, 1), (0.5, 10), (0.95, 19), (0.951, 20), (1.0, 20), (0.0, 1)):
        assert found.quantile(level) == pytest.approx(exact, rel=ACCURACY)
    assert Sketch().quantile(0.5) is None


def test_a_sketch_stays_small() -> None:
    found = sketch((10.0 ** np.linspace(-300, 300, 5000)).tolist())
    assert len(found.to_json()) < 20_000
    assert found.value_at(5000) == pytest.approx(1e7, rel=ACCURACY)
    assert found.value_at(1) == 0


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_sketch_refuses_what_it_cannot_hold(value: float) -> None:
    with pytest.raises(ExperimentError, match="at least 0"):
        Sketch().add(value)


@pytest.mark.parametrize("form", [None, "%%", "aGVsbG8="])
def test_a_damaged_sketch_is_refused(form: object) -> None:
    with pytest.raises(ExperimentError, match="sketch: not readable"):
        Sketch.from_json(form)


def test_a_sketch_of_no_values_has_no_ranks() -> None:
    with pytest.raises(IndexError):
        Sketch().value_at(1)


def test_units_are_counted_once_up_to_the_cap() -> None:
    found = UnitSample(cap=100)
    for i in range(100):
        for _ in range(3):
            found.add(unit_hash(b"s", "e", f"{i}"), "AB"[i % 2])
    assert (found.level, found.sampled()) == (0, {"A": 50, "B": 50})


def test_above_the_cap_a_known_share_of_units_is_counted_exactly() -> None:
    found = UnitSample(cap=500)
    hashes = {unit_hash(b"s", "e", f"{i}"): "AB"[i % 4 == 0] for i in range(20_000)}
    for unit, arm in hashes.items():
        found.add(unit, arm)
    inside = [arm for unit, arm in hashes.items() if unit < 2 ** (64 - found.level)]
    assert found.level in (6, 7)
    assert found.sampled() == {"A": inside.count("A"), "B": inside.count("B")}
    total = distinct_units([found])
    assert sum(total.values()) == pytest.approx(20_000, rel=0.2)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.integers(0, 40))
def test_merged_samples_count_shared_units_once(hashes: list[int], cut: int) -> None:
    one, two, whole = (UnitSample(cap=8) for _ in range(3))
    for i, unit in enumerate(hashes):
        whole.add(unit, "A")
        if i <= cut:
            one.add(unit, "A")
        if i >= cut:
            two.add(unit, "A")
    one.merge(two)
    assert (one.level, one.arms) == (whole.level, whole.arms)
    back = UnitSample.from_json(json.loads(json.dumps(one.to_json())))
    assert (back.level, back.arms) == (one.level, one.arms)


def test_units_over_phases_count_once_in_each_arm() -> None:
    one = UnitSample(arms={1: "A", 2: "A", 3: "B"})
    two = UnitSample(arms={1: "B", 2: "A", 4: "B"})
    assert distinct_units([one, two]) == {"A": 2, "B": 3}
    assert distinct_units([]) == {}


def test_the_unit_hash_is_independent_of_arm_and_experiment() -> None:
    hashes = [unit_hash(b"s", "e", f"user={i}") for i in range(4096)]
    assert len(set(hashes)) == 4096
    assert unit_hash(b"s", "e", "x") != unit_hash(b"s", "f", "x")
    counts = np.bincount([h % BUCKETS for h in hashes], minlength=BUCKETS)
    # Chi-square with 255 degrees of freedom, 0.9999 quantile.
    assert ((counts - 16) ** 2 / 16).sum() < 347


def test_cluster_variance_is_the_textbook_one() -> None:
    rng = np.random.default_rng(2)
    found = ClusterSums()
    values: dict[int, list[float]] = {}
    for unit in range(BUCKETS):  # one unit a class: no grouping
        values[unit] = rng.normal(rng.normal(), size=rng.integers(1, 9)).tolist()
        for value in values[unit]:
            found.add(unit, value)
    everything = [x for xs in values.values() for x in xs]
    mean, n = statistics.fmean(everything), len(everything)
    score = [(sum(xs) - mean * len(xs)) / n for xs in values.values()]
    expected = sum(x * x for x in score) * BUCKETS / (BUCKETS - 1)
    assert covariance(found.scores(), found.scores()) == pytest.approx(expected)
    assert ClusterSums().scores().tolist() == [0.0] * BUCKETS


def test_grouped_units_give_the_variance_of_the_mean_without_bias() -> None:
    rng = np.random.default_rng(3)
    means, variances = [], []
    for _ in range(300):
        found = ClusterSums()
        buckets = rng.integers(0, BUCKETS, 1000)
        sizes = rng.integers(1, 6, 1000)
        totals = sizes * rng.normal(0, 1, 1000) + rng.normal(0, 1, 1000) * np.sqrt(sizes)
        np.add.at(found.counts, buckets, sizes)
        np.add.at(found.sums, buckets, totals)
        means.append(found.sums.sum() / found.counts.sum())
        variances.append(covariance(found.scores(), found.scores()))
    # The empirical variance of 300 means scatters by 8%; the average of variances by 0.5%.
    assert statistics.fmean(variances) == pytest.approx(statistics.variance(means), rel=0.25)


SHARES = {"A": 900_000, "B": 100_000}


def filled(seed: int, phases: int = 1) -> Measurements:
    rng = np.random.default_rng(seed)
    found = Measurements()
    for phase in range(phases):
        found.begin(SHARES)
        for _ in range(50):
            unit, arm = int(rng.integers(2**63)), "AB"[int(rng.integers(2))]
            found.assigned(phase, unit, arm)
            found.finished(phase, unit, arm, {"e2e_seconds": float(rng.exponential()), "loop": 0.0})
    return found


def test_replicas_merge_and_survive_json() -> None:
    one, two = filled(1), filled(2, phases=2)
    back = Measurements.from_json(json.loads(json.dumps(one.to_json())))
    assert back.to_json() == one.to_json()
    back.merge(two)
    assert len(back.phases) == 2
    assert sum(back.phases[0].units.sampled().values()) == 100
    for arm in "AB":
        cells = [x.phases[0].cells[arm]["e2e_seconds"] for x in (one, two)]
        merged = back.phases[0].cells[arm]["e2e_seconds"]
        assert merged.moments.count == sum(x.moments.count for x in cells)
        assert merged.clusters.counts.sum() == merged.moments.count
        assert merged.sketch is not None
        assert merged.sketch.count == merged.moments.count
        assert back.phases[0].cells[arm]["loop"].sketch is None


def test_replicas_that_disagree_are_not_merged() -> None:
    other = Measurements()
    other.begin({"A": 1_000_000, "B": 0})
    with pytest.raises(ExperimentError, match="phase 0: found the shares"):
        filled(1).merge(other)


def test_what_does_not_belong_is_refused_and_nothing_is_added() -> None:
    found = filled(1)
    before = json.dumps(found.to_json())
    with pytest.raises(ExperimentError, match="expected one of A, B"):
        found.assigned(0, 1, "C")
    with pytest.raises(ExperimentError, match="phase: found 1, expected one of 1"):
        found.finished(1, 1, "A", {})
    with pytest.raises(ExperimentError, match=r"loop: found 2\.0"):
        found.finished(0, 1, "A", {"e2e_seconds": 1.0, "loop": 2.0})
    assert json.dumps(found.to_json()) == before
    with pytest.raises(ExperimentError, match="phase: found 0"):
        Measurements().assigned(0, 1, "A")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, "version: found 2"),
        ({"phases": {}}, "phases: found"),
        ({"phases": [{"shares": {"A": 1}, "units": {"level": 0, "units": {"A": "?"}}}]}, "units"),
        (
            {"phases": [{"shares": {}, "units": {"level": 0, "units": {}}, "cells": {"A": 1}}]},
            "cells",
        ),
    ],
)
def test_damaged_measurements_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ExperimentError, match=reason):
        Measurements.from_json({"version": 1, "phases": [], **change})
