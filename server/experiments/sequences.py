"""Always-valid bounds: true at all times at once with probability 1 - alpha.

Means rest on the normal mixture (Robbins 1970) in the asymptotic form of Waudby-Smith, Arbour,
Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences"
(2021). Quantiles rest on the exact mixture for the number of values below (Howard and Ramdas,
"Sequential estimation of quantiles", Bernoulli 2022): it counts Bernoulli trials.

All functions take NumPy arrays as well as numbers and broadcast them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import betaln, xlog1py, xlogy


def prior_variance(variance: Any, units: Any, planned: float, alpha: float) -> Any:
    """Variance of the mixture over effects that makes bounds narrowest at ``planned`` units.

    With ``rho^2 = (-2 log a + log(-2 log a + 1)) / planned`` and ``a = 2 alpha`` for a one-sided
    bound (Waudby-Smith et al., section on tuning), this is ``rho^2`` times the variance per unit.

    Args:
        variance: of the estimate as it stands.
        units: behind the estimate as it stands.
        planned: at how many bounds shall be narrowest. They are valid at any number.
        alpha: of the one-sided bound.
    """
    spent = -2 * math.log(min(2 * alpha, 0.9))
    return (spent + math.log(spent + 1)) / planned * variance * units


def one_sided_radius(variance: Any, prior: Any, alpha: float) -> Any:
    """How far below an estimate its lower bound lies, or the upper one above it.

    The half-normal mixture ``2 / sqrt(v) exp(z^2 / 2) Phi(z)``, ``v = 1 + prior / variance``, is a
    test martingale for "the effect is at most 0"; with ``Phi(z) >= 1 - exp(-z^2 / 2) / 2`` it
    passes ``1 / alpha`` at the latest where ``z^2 = 2 log(1/2 + sqrt(v) / (2 alpha))``.

    Args:
        variance: of the estimate; where it is 0 the radius is 0.
        prior: variance of the mixture (``prior_variance``).
        alpha: chance that the bound is ever false.
    """
    variance, prior = np.asarray(variance, float), np.asarray(prior, float)
    ratio = np.divide(prior, variance, out=np.ones_like(variance * prior), where=variance > 0)
    z2 = 2 * np.log(0.5 + np.sqrt(1 + ratio) / (2 * alpha))
    return np.sqrt(variance * z2 * (1 + 1 / ratio))[()]


def two_sided_radius(variance: Any, prior: Any, alpha: float) -> Any:
    """Half the width of an interval; ``sqrt(V (V + T) / T log((V + T) / (V alpha^2)))``.

    The normal mixture ``exp(z^2 / 2) / sqrt(v)`` set equal to ``1 / alpha``; arguments as for
    ``one_sided_radius``.
    """
    variance, prior = np.asarray(variance, float), np.asarray(prior, float)
    ratio = np.divide(prior, variance, out=np.ones_like(variance * prior), where=variance > 0)
    z2 = np.log(1 + ratio) - 2 * math.log(alpha)
    return np.sqrt(variance * z2 * (1 + 1 / ratio))[()]


def log_bernoulli_evidence(hits: Any, trials: Any, rate: Any, a: Any = 0.5, b: Any = 0.5) -> Any:
    """Log of the beta mixture martingale against "the rate is ``rate``".

    ``B(a + hits, b + misses) / B(a, b) / (rate^hits (1 - rate)^misses)``. Values in [0, 1] may
    stand for hits: the martingale is then a supermartingale, because the likelihood ratio is
    convex in the value.
    """
    misses = trials - hits
    mixed = betaln(a + hits, b + misses) - betaln(a, b)
    return mixed - xlogy(hits, rate) - xlog1py(misses, -np.asarray(rate, float))


def rank_interval(
    count: int, level: float, alpha: float, planned: float, inflation: float = 1.0
) -> tuple[int, int]:
    """Ranks between which the quantile lies: ``[lower, upper]``, each false at most at ``alpha``.

    With k values at or below the quantile, k of n is a Bernoulli count with rate ``level`` (at
    least, if values tie). All k with evidence below ``1 / alpha`` are possible; the quantile is
    at least the smallest of them's order statistic, and at most that after the largest.

    Args:
        count: values seen.
        level: of the quantile, in (0, 1).
        alpha: chance that the interval is ever false.
        planned: count at which it shall be narrowest.
        inflation: variance of clustered values over that of independent ones (design effect);
            counts are divided by it (Rao and Scott 1992).

    Returns:
        Ranks from 0 (unbounded below) to ``count + 1`` (unbounded above).
    """
    trials = count / inflation
    spent = -2 * math.log(alpha)
    # A beta whose variance is that of the normal mixture which is best at the planned count.
    weight = max(1.0, planned / inflation / (spent + math.log(spent + 1)) - 1)
    a, b = weight * level, weight * (1 - level)
    limit = -math.log(alpha)

    def possible(k: int) -> bool:
        found = log_bernoulli_evidence(k / inflation, trials, level, a, b)
        return bool(found < limit)

    # The evidence is convex in k and lowest about the expected rank.
    middle = min(max(round(count * level), 0), count)
    return _edge(middle, 0, possible), _edge(middle, count, possible) + 1


def _edge(inside: int, end: int, possible: Any) -> int:
    """The possible rank nearest to ``end``; ``inside`` is possible, and no gap lies between."""
    if possible(end):
        return end
    while abs(end - inside) > 1:
        middle = (inside + end) // 2
        inside, end = (middle, end) if possible(middle) else (inside, middle)
    return inside
