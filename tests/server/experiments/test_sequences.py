from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import integrate, optimize
from scipy.special import betaln

from liveprune.server.experiments.mismatch import (
    CONCENTRATION,
    UnitCounts,
    log_mismatch,
    mismatch_p,
    spending,
)
from liveprune.server.experiments.sequences import (
    log_bernoulli_evidence,
    one_sided_radius,
    prior_variance,
    rank_interval,
    two_sided_radius,
)

ALPHA = 0.05


def mixture(estimate: float, variance: float, prior: float, start: float) -> float:
    """Likelihood ratio of a normal estimate, integrated over normal effects from ``start`` up."""

    def density(effect: float) -> float:
        exponent = (effect * estimate - effect**2 / 2) / variance - effect**2 / (2 * prior)
        return math.exp(exponent) / math.sqrt(2 * math.pi * prior)

    found, _ = integrate.quad(density, start, np.inf, epsabs=0)
    return float(found)


@pytest.mark.parametrize(("variance", "prior"), [(1.0, 1.0), (0.01, 0.3), (2.0, 0.01)])
def test_the_two_sided_bound_is_where_the_integrated_mixture_reaches_one_over_alpha(
    variance: float, prior: float
) -> None:
    estimate = float(two_sided_radius(variance, prior, ALPHA))
    assert mixture(estimate, variance, prior, -np.inf) == pytest.approx(1 / ALPHA, rel=1e-6)


@pytest.mark.parametrize(("variance", "prior"), [(1.0, 1.0), (0.01, 0.3), (2.0, 0.01)])
def test_the_one_sided_bound_is_just_beyond_the_integrated_half_mixture(
    variance: float, prior: float
) -> None:
    found = float(one_sided_radius(variance, prior, ALPHA))
    exact = optimize.brentq(
        lambda x: 2 * mixture(x, variance, prior, 0.0) - 1 / ALPHA, found / 2, 1.01 * found
    )
    assert exact <= found <= 1.03 * exact


def test_the_published_closed_form() -> None:
    """Waudby-Smith et al. (2021), Theorem 2.2, in their own symbols."""
    t, rho, sigma = 500.0, 0.1, 3.0
    width = sigma * math.sqrt(
        2 * (t * rho**2 + 1) / (t**2 * rho**2) * math.log(math.sqrt(t * rho**2 + 1) / ALPHA)
    )
    found = two_sided_radius(sigma**2 / t, sigma**2 * rho**2, ALPHA)
    assert found == pytest.approx(width, rel=1e-12)


def test_the_prior_makes_the_bound_narrowest_about_the_planned_units() -> None:
    units, widths = 1000, []
    for planned in (100, 300, 1000, 3000, 10_000):
        prior = prior_variance(1 / units, units, planned, ALPHA)
        widths.append(float(one_sided_radius(1 / units, prior, ALPHA)))
    assert min(widths) == widths[2]


def test_without_variance_the_radius_is_nothing() -> None:
    assert one_sided_radius(0.0, 0.0, ALPHA) == 0.0
    assert two_sided_radius(0.0, 0.0, ALPHA) == 0.0


@pytest.mark.parametrize(("hits", "trials", "rate"), [(3, 10, 0.5), (0, 40, 0.1), (7.5, 9, 0.2)])
def test_bernoulli_evidence_is_the_integrated_mixture(
    hits: float, trials: float, rate: float
) -> None:
    def ratio(q: float) -> float:
        return (q / rate) ** hits * ((1 - q) / (1 - rate)) ** (trials - hits)

    # The weight (1 - q)^-1/2 q^-1/2 / pi of the Beta(1/2, 1/2), singular ends handled by quad.
    value, _ = integrate.quad(ratio, 0, 1, weight="alg", wvar=(-0.5, -0.5))
    found = log_bernoulli_evidence(hits, trials, rate)
    assert found == pytest.approx(math.log(value / math.pi), rel=1e-7)


@pytest.mark.parametrize(
    ("count", "level", "inflation"),
    [(1, 0.5, 1.0), (57, 0.95, 1.0), (400, 0.5, 1.0), (300, 0.9, 2.5)],
)
def test_rank_interval_is_that_of_a_loop_over_all_ranks(
    count: int, level: float, inflation: float
) -> None:
    planned = 200
    spent = -2 * math.log(ALPHA)
    weight = max(1.0, planned / inflation / (spent + math.log(spent + 1)) - 1)
    possible = []
    for k in range(count + 1):
        hits, misses = k / inflation, (count - k) / inflation
        a, b = weight * level, weight * (1 - level)
        log = (
            math.lgamma(a + hits)
            + math.lgamma(b + misses)
            - math.lgamma(a + b + hits + misses)
            - math.lgamma(a)
            - math.lgamma(b)
            + math.lgamma(a + b)
            - hits * math.log(level)
            - misses * math.log(1 - level)
        )
        if log < -math.log(ALPHA):
            possible.append(k)
    found = rank_interval(count, level, ALPHA, planned, inflation)
    assert found == (possible[0], possible[-1] + 1)


def test_few_values_leave_a_high_quantile_unbounded_above() -> None:
    low, high = rank_interval(30, 0.99, ALPHA, 1000)
    assert high == 31
    assert low > 0


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, shape: rng.normal(size=shape),
        lambda rng, shape: rng.exponential(size=shape),
        lambda rng, shape: rng.lognormal(0, 0.8, size=shape),
    ],
    ids=["normal", "exponential", "lognormal"],
)
def test_a_a_runs_with_a_look_at_every_unit_raise_few_false_alarms(
    draw: Callable[[np.random.Generator, tuple[int, int, int]], np.ndarray],
) -> None:
    """Acceptance case 5: 1,000 runs, a look at each of 950 pairs."""
    values = draw(np.random.default_rng(20), (2, 1000, 1000))
    n = np.arange(1, 1001)
    mean = values.cumsum(-1) / n
    square = (values**2).cumsum(-1) / n
    variance = ((square - mean**2) * n / np.maximum(n - 1, 1) / n).sum(0)
    difference = mean[1] - mean[0]
    one = one_sided_radius(variance, prior_variance(variance, 2 * n, 1000, ALPHA), ALPHA)
    two = two_sided_radius(variance, prior_variance(variance, 2 * n, 1000, ALPHA), ALPHA)
    looked = n >= 50
    above = ((difference > one) & looked).any(-1).mean()
    below = ((difference < -one) & looked).any(-1).mean()
    outside = ((abs(difference) > two) & looked).any(-1).mean()
    assert above <= ALPHA
    assert below <= ALPHA
    assert outside <= ALPHA
    # And it is no empty promise: a fixed-horizon test looked at as often is wrong far more often.
    peeking = ((difference > 1.645 * np.sqrt(variance)) & looked).any(-1).mean()
    assert peeking > 3 * ALPHA


def test_a_real_effect_is_found() -> None:
    rng = np.random.default_rng(21)
    n = 1000
    difference = rng.normal(0.2, math.sqrt(2 / n), 1000)
    radius = one_sided_radius(2 / n, prior_variance(2 / n, 2 * n, 2000, ALPHA), ALPHA)
    assert (difference > radius).mean() > 0.9


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_quantiles_stay_inside_at_every_look(level: float) -> None:
    rng = np.random.default_rng(22)
    looks = np.arange(20, 2001, 20)
    # What matters of a sample is how many values lie below the true quantile.
    below = (rng.random((1000, 2000)) < level).cumsum(1)[:, looks - 1]
    ranks = np.array([rank_interval(int(n), level, ALPHA, 1000) for n in looks])
    lower_false = (below < ranks[:, 0]).any(1).mean()
    upper_false = (below >= ranks[:, 1]).any(1).mean()
    assert lower_false <= ALPHA
    assert upper_false <= ALPHA
    width = (ranks[-1, 1] - ranks[-1, 0]) / 2000
    assert width < 8 * math.sqrt(level * (1 - level) / 2000)


def test_mismatch_is_the_sequential_product() -> None:
    """The predictive form: each unit's arm under the mixture so far, over its share."""
    shares = {"A": 0.7, "B": 0.2, "C": 0.1}
    order = "ABACABBCAAABCCCA"
    log, weights = 0.0, {arm: CONCENTRATION * share for arm, share in shares.items()}
    for arm in order:
        log += math.log(weights[arm] / sum(weights.values())) - math.log(shares[arm])
        weights[arm] += 1
    counts = {arm: order.count(arm) for arm in shares}
    assert log_mismatch(counts, shares) == pytest.approx(log, rel=1e-9)


def test_units_in_an_arm_without_share_are_a_mismatch() -> None:
    assert mismatch_p([UnitCounts({"A": 5, "B": 1}, {"A": 1_000_000, "B": 0})]) == 0.0
    assert mismatch_p([UnitCounts({"A": 5}, {"A": 1_000_000, "B": 0})]) == 1.0
    assert mismatch_p([]) == 1.0


def test_sixty_forty_under_fifty_fifty_is_flagged() -> None:
    even = {"A": 500_000, "B": 500_000}
    assert mismatch_p([UnitCounts({"A": 600, "B": 400}, even)]) < 0.001
    assert mismatch_p([UnitCounts({"A": 520, "B": 480}, even)]) > 0.001
    quiet = UnitCounts({"A": 500, "B": 500}, even)
    assert mismatch_p([quiet, quiet, UnitCounts({"A": 660, "B": 440}, even, level=2)]) < 0.001


def test_alpha_is_shared_out_and_not_exceeded() -> None:
    assert sum(spending(i) for i in range(10_000)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_mismatch_raises_few_false_alarms_at_every_look(share: float) -> None:
    rng = np.random.default_rng(23)
    n = np.arange(1, 2001)
    b = (rng.random((2000, 2000)) < share).cumsum(1)
    x, y = CONCENTRATION * (1 - share), CONCENTRATION * share
    log = (
        betaln(x + n - b, y + b)
        - betaln(x, y)
        - (n - b) * math.log(1 - share)
        - b * math.log(share)
    )
    i = (7, 1500)
    counts = {"A": int(n[1500] - b[i]), "B": int(b[i])}
    assert log_mismatch(counts, {"A": 1 - share, "B": share}) == pytest.approx(log[i], rel=1e-8)
    for alpha in (0.05, 0.01):
        assert (log >= -math.log(alpha)).any(1).mean() <= alpha
