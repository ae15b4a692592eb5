from __future__ import annotations

import math

import numpy as np
import pytest

from liveprune.pruning.evaluation.intervals import (
    mean_interval,
    paired_difference,
    student_quantile,
    wilson,
)


def test_wilson_by_its_defining_equation() -> None:
    """Both ends p solve |share - p| = z sqrt(p (1 - p) / n)."""
    z = 1.959963984540054
    for successes, n in [(1, 3), (7, 10), (3.5, 20), (81, 263), (499, 500)]:
        for p in wilson(successes, n):
            assert abs(successes / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n))


def test_wilson_against_newcombe_1998() -> None:
    """Table I of the paper, method 3."""
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611)}
    for (successes, n), expected in published.items():
        assert wilson(successes, n) == pytest.approx(expected, abs=5e-5)


def test_wilson_at_the_edges() -> None:
    assert wilson(0, 0) == (0, 1)
    assert wilson(0, 7).low == 0
    assert wilson(7, 7).high == 1
    with pytest.raises(ValueError, match="found 4, expected 0 to 3"):
        wilson(4, 3)


def test_student_quantile_closed_forms() -> None:
    assert student_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)
    assert student_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)
    # nu = 4: P = s + s (1 - s^2) / 2 with s = t / sqrt(4 + t^2).
    t = student_quantile(4)
    s = t / math.sqrt(4 + t * t)
    assert s + s * (1 - s * s) / 2 == pytest.approx(0.95, abs=1e-12)


@pytest.mark.parametrize("degrees", [3, 7, 30, 199, 5000])
def test_student_quantile_holds_95_percent_of_the_density(degrees: int) -> None:
    t = np.linspace(0, student_quantile(degrees), 20001)
    log_constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    log_constant -= math.log(degrees * math.pi) / 2
    density = np.exp(log_constant - (degrees + 1) / 2 * np.log1p(t * t / degrees))
    simpson = density[0] + density[-1] + 4 * density[1::2].sum() + 2 * density[2:-1:2].sum()
    assert 2 * simpson * (t[1] - t[0]) / 3 == pytest.approx(0.95, abs=1e-9)


def test_student_quantile_of_many_degrees_is_the_normal_one() -> None:
    assert student_quantile(10**6) == pytest.approx(1.959963984540054, abs=3e-6)


def test_means_of_shares_are_wilson() -> None:
    assert mean_interval([1, 0, 1, 1]) == wilson(3, 4)
    assert mean_interval([]) == (0, 1)
    assert mean_interval([1.0]) == wilson(1, 1)


def test_means_of_other_values_are_student() -> None:
    # Mean 0.5, variance (0.04 + 0 + 0.04) / 2 = 0.04, standard error 0.2 / sqrt(3).
    half = 4.302652729749464 * 0.2 / math.sqrt(3)
    assert half == pytest.approx(0.496828, abs=1e-6)
    assert mean_interval([0.3, 0.5, 0.7]) == pytest.approx((0.5 - half, 0.5 + half))
    assert mean_interval([0.6, 0.8, 0.99]).high == 1


def test_means_without_spread() -> None:
    assert mean_interval([0.3]) == (0, 1)
    # 0.1 three times has a mean other than 0.1 in floating point, and a remainder of variance.
    assert mean_interval([0.1] * 3) == pytest.approx((0.1, 0.1), abs=1e-15)
    low, high = mean_interval([0.1] * 3)
    assert low == high


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1])
def test_values_out_of_range_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="expected 0 to 1"):
        mean_interval([0.5, bad])
    with pytest.raises(ValueError, match="expected 0 to 1"):
        paired_difference([0.5, 0.5], [0.5, bad])


def test_paired_difference_by_hand() -> None:
    # Differences 1, 0, 0, -1, 1: mean 0.2, variance 2.8 / 4 = 0.7, standard error sqrt(0.14).
    found = paired_difference([1, 0, 1, 0, 1], [0, 0, 1, 1, 0])
    error = math.sqrt(0.14)
    assert found.difference == pytest.approx(0.2)
    assert found.z == pytest.approx(0.2 / error)
    # 2.776445 is Student's quantile of 4 degrees.
    assert found.interval.high == 1
    assert found.interval.low == pytest.approx(0.2 - 2.776445105 * error)


def test_paired_difference_changes_sign_with_its_sides() -> None:
    a, b = [0.3, 0.9, 0.4, 0.8], [0.2, 0.5, 0.5, 0.1]
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert other.difference == -one.difference
    assert other.z == -one.z
    assert other.interval == (-one.interval.high, -one.interval.low)


def test_paired_difference_without_spread() -> None:
    assert paired_difference([1, 0, 1], [1, 0, 1]) == (0, (0, 0), 0)
    assert paired_difference([1, 1], [0, 0]) == (1, (1, 1), math.inf)
    assert paired_difference([0, 0], [1, 1]) == (-1, (-1, -1), -math.inf)
    assert paired_difference([1], [0]) == (1, (-1, 1), 0)
    empty = paired_difference([], [])
    assert math.isnan(empty.difference)
    assert empty[1:] == ((-1, 1), 0)


def test_paired_difference_needs_the_same_rows() -> None:
    with pytest.raises(ValueError, match="found 2 and 1"):
        paired_difference([0, 1], [1])
