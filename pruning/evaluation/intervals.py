"""95 % intervals of means and of paired differences of values in [0, 1].

Shares get Wilson's score interval; other means Student's t. Paired differences get Student's t:
comparing two variants row by row takes the rows' own difficulty out of the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
_UPPER = (1 + LEVEL) / 2

Values = npt.NDArray[np.float64] | Sequence[float]


class Interval(NamedTuple):
    """Both ends belong to it."""

    low: float
    high: float


class Paired(NamedTuple):
    """How far one variant is ahead of another on the same rows."""

    difference: float
    """Mean of a - b; NaN without rows."""
    interval: Interval
    z: float
    """The difference in units of its standard error."""


def wilson(successes: float, n: int) -> Interval:
    """Interval of a share: Wilson's score, without continuity correction (Wilson 1927).

    Without rows nothing is known: (0, 1).

    Raises:
        ValueError: ``successes`` is not within 0 and ``n``.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes: found {successes}, expected 0 to {n}")
    if n == 0:
        return Interval(0.0, 1.0)
    z2 = NormalDist().inv_cdf(_UPPER) ** 2
    share = successes / n
    centre = share + z2 / (2 * n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    # At 0 and n of n one end is exact; rounding must not carry it past the share itself.
    low = 0.0 if successes == 0 else (centre - half) / (1 + z2 / n)
    high = 1.0 if successes == n else (centre + half) / (1 + z2 / n)
    return Interval(low, high)


def mean_interval(values: Values) -> Interval:
    """Interval of the mean of values in [0, 1]: Wilson's if all are 0 or 1, else Student's t.

    Cut to [0, 1]. One value that is neither 0 nor 1 says nothing about the spread: (0, 1), as
    without values. Equal values have no spread: both ends are that value.

    Raises:
        ValueError: a value is not within 0 and 1 (NaN neither).
    """
    array = np.asarray(values, np.float64)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"values: found {array.min()} to {array.max()}, expected 0 to 1")
    if np.isin(array, (0.0, 1.0)).all():
        return wilson(float(array.sum()), len(array))
    if len(array) == 1:
        return Interval(0.0, 1.0)
    mean, half = float(array.mean()), _half_width(array)
    return Interval(max(0.0, mean - half), min(1.0, mean + half))


def paired_difference(a: Values, b: Values) -> Paired:
    """Compare values in [0, 1] of two variants on the same rows; positive: ``a`` is better.

    The interval is Student's t of the differences, cut to [-1, 1]; with fewer than two rows it
    is (-1, 1) and z is 0. Equal differences have no spread: both ends are that difference and z
    is infinite with its sign, or 0 where it is 0.

    Raises:
        ValueError: the numbers of rows differ, or a value is not within 0 and 1.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"rows: found {len(first)} and {len(second)}, expected the same rows")
    for array in (first, second):
        if not ((array >= 0) & (array <= 1)).all():
            raise ValueError(f"values: found {array.min()} to {array.max()}, expected 0 to 1")
    differences = first - second
    if not len(differences):
        return Paired(math.nan, Interval(-1.0, 1.0), 0.0)
    mean = float(differences.mean())
    if len(differences) == 1:
        return Paired(mean, Interval(-1.0, 1.0), 0.0)
    error = _standard_error(differences)
    if error == 0:
        z = math.copysign(math.inf, mean) if mean else 0.0
        return Paired(mean, Interval(mean, mean), z)
    half = _half_width(differences)
    return Paired(mean, Interval(max(-1.0, mean - half), min(1.0, mean + half)), mean / error)


def _standard_error(array: npt.NDArray[np.float64]) -> float:
    """Of the mean; exactly 0 for equal values, where rounding would leave a remainder."""
    if (array == array[0]).all():
        return 0.0
    return float(array.std(ddof=1)) / math.sqrt(len(array))


def _half_width(array: npt.NDArray[np.float64]) -> float:
    return student_quantile(len(array) - 1) * _standard_error(array)


@lru_cache(maxsize=256)
def student_quantile(degrees: int) -> float:
    """The t with P(|T| <= t) = 0.95 for Student's distribution with ``degrees`` of freedom.

    Newton's method on the finite series for whole degrees (Abramowitz and Stegun 26.7.3 and
    26.7.4). The distribution is concave right of 0 and the normal quantile lies left of t, so the
    steps rise to t without passing it.
    """
    log_density = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    log_density -= math.log(degrees * math.pi) / 2
    t = NormalDist().inv_cdf(_UPPER)
    while True:
        density = math.exp(log_density - (degrees + 1) / 2 * math.log1p(t * t / degrees))
        step = (LEVEL - _within(t, degrees)) / (2 * density)
        t += step
        if abs(step) <= 1e-9 * t:
            return t


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    # Powers of the cosine; each coefficient is the one before it times (j - 1) / j.
    j = np.arange(odd, degrees - 1, 2, dtype=np.float64)
    ratios = (j - 1) / np.maximum(j, 1)
    ratios[:1] = 1.0
    series = float((np.cumprod(ratios) * cosine**j).sum())
    return 2 / math.pi * (angle + sine * series) if odd else sine * series
