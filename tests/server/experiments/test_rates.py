from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate
from scipy.special import xlog1py, xlogy

from liveprune.server.experiments.rates import Counts, bound, log_evidence

ALPHA = 0.05


def counts(*rows: tuple[float, float, float, float]) -> Counts:
    """Rows are phases: control hits and number, treatment hits and number."""
    return Counts(*(np.array(column, float) for column in zip(*rows, strict=True)))


def plain_evidence(rows: list[tuple[float, float, float, float]], scale: float, m: float) -> float:
    """Of "above": a fine grid over the pairs of rates that satisfy the claim, and integration."""

    def mixture(hits: float, n: float) -> float:
        value, _ = integrate.quad(
            lambda q: q**hits * (1 - q) ** (n - hits),
            0,
            1,
            weight="alg",
            wvar=(-0.5, -0.5),
            epsabs=0,
        )
        return math.log(value / math.pi)

    sums = [sum(column) for column in zip(*rows, strict=True)]
    found = mixture(sums[0], sums[1]) + mixture(sums[2], sums[3])
    p = np.linspace(0, 1, 1201)
    for hits, n, t_hits, t in rows:
        best = -math.inf
        for claimed in np.linspace(-scale, m, 801):
            q = scale * p + claimed
            fits = (q >= 0) & (q <= 1)
            x, y = p[fits], q[fits]
            log = xlogy(hits, x) + xlog1py(n - hits, -x) + xlogy(t_hits, y)
            best = max(best, float((log + xlog1py(t - t_hits, -y)).max(initial=-math.inf)))
        found -= best
    return found


@pytest.mark.parametrize(
    ("rows", "scale", "claim"),
    [
        ([(2, 20, 9, 20)], 1.0, 0.0),
        ([(2, 20, 9, 20)], 1.0, 0.5),
        ([(5, 30, 9, 15)], 1.2, 0.1),
        ([(0, 25, 3, 10)], 1.0, 0.01),
        ([(2, 20, 9, 20), (4, 12, 3, 12)], 1.0, 0.05),
    ],
)
def test_evidence_is_that_of_a_grid_over_both_rates(
    rows: list[tuple[float, float, float, float]], scale: float, claim: float
) -> None:
    found = float(log_evidence(counts(*rows), scale, claim, "above"))
    assert found == pytest.approx(plain_evidence(rows, scale, claim), abs=0.01)


def test_below_is_above_with_hits_and_misses_exchanged() -> None:
    one = log_evidence(counts((3, 20, 1, 30)), 1.0, 0.2, "below")
    other = log_evidence(counts((17, 20, 29, 30)), 1.0, -0.2, "above")
    assert float(one) == pytest.approx(float(other), rel=1e-6)


@pytest.mark.parametrize("side", ["above", "below"])
@pytest.mark.parametrize(
    "rows", [[(10, 1000, 12, 900)], [(0, 50, 0, 50)], [(40, 80, 5, 70), (9, 20, 30, 400)]]
)
def test_the_bound_is_where_the_evidence_reaches_one_over_alpha(
    rows: list[tuple[float, float, float, float]], side: str
) -> None:
    assert side in ("above", "below")
    found = bound(counts(*rows), 1.0, ALPHA, side)
    step = 4e-6 if side == "above" else -4e-6
    limit = -math.log(ALPHA)
    assert float(log_evidence(counts(*rows), 1.0, found, side)) >= limit
    assert float(log_evidence(counts(*rows), 1.0, found + step, side)) < limit


def test_the_observed_difference_lies_between_the_bounds() -> None:
    for rows in ([(0, 5, 5, 5)], [(300, 1000, 320, 1000)], [(1, 1, 0, 1)]):
        lower, upper = (bound(counts(*rows), 1.0, ALPHA, side) for side in ("above", "below"))
        (hits, n, t_hits, t) = rows[0]
        assert -1 <= lower <= t_hits / t - hits / n <= upper <= 1


def test_one_value_in_each_arm_proves_little() -> None:
    assert bound(counts((0, 1, 1, 1)), 1.0, ALPHA, "above") < -0.7
    assert bound(counts((0, 1, 1, 1)), 1.0, ALPHA, "below") == 1


@pytest.mark.parametrize("rate", [0.003, 0.05, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_a_a_runs_raise_few_false_alarms_at_every_look(rate: float, scale: float) -> None:
    """Both arms at the edge of the margin: 1,000 runs, a look every 20 values, the first at 20."""
    rng = np.random.default_rng(30)
    looks = np.arange(20, 1501, 20)
    control, treatment = (
        (rng.random((1000, 1500)) < p).cumsum(1)[:, looks - 1].astype(float)
        for p in (rate, rate * scale)
    )
    n = np.broadcast_to(looks.astype(float), control.shape)
    found = Counts(control[None], n[None], treatment[None], n[None])
    for side in ("above", "below"):
        assert side in ("above", "below")
        wrong = (log_evidence(found, scale, 0.0, side) >= -math.log(ALPHA)).any(1).mean()
        assert wrong <= ALPHA


def test_a_ramp_while_rates_drift_is_no_effect() -> None:
    """Most of treatment's traffic comes when failures are frequent: pooled, it would look bad."""
    rows = [(90, 9000, 10, 1000), (500, 5000, 500, 5000)]
    sums = tuple(sum(column) for column in zip(*rows, strict=True))
    assert bound(counts(sums), 1.0, ALPHA, "above") > 0  # type: ignore[arg-type]
    assert bound(counts(*rows), 1.0, ALPHA, "above") < 0


def test_a_bad_variant_is_found_within_fifty_requests() -> None:
    rng = np.random.default_rng(31)
    bad = rng.binomial(50, 0.4, 1000).astype(float)
    good = rng.binomial(50, 0.02, 1000).astype(float)
    n = np.full(1000, 50.0)
    found = log_evidence(Counts(good[None], n[None], bad[None], n[None]), 1.0, 0.01, "above")
    assert (found >= -math.log(ALPHA)).mean() > 0.9
