"""Always-valid comparison of two rates, exact at any sample size: for failures that are rare.

Treatment rate ``q`` and control rate ``p`` are compared by ``q - scale * p``. Evidence against
"that is at most m" is a mixture over both rates divided by the likelihood of the best pair of
rates which agrees with the claim. For every fixed pair the ratio is a test martingale (a product
of two beta-binomial ones), so the smallest over pairs is an e-process: it exceeds ``1 / alpha``
with probability at most ``alpha``, ever (Ville; Wasserman, Ramdas and Balakrishnan, "Universal
inference", 2020; Turner, Ly and Grünwald, "Generic E-variables for exact sequential k-sample
tests", 2021).

Over several phases the mixture is one pair of rates, the claim a pair for each phase: traffic that
changes between phases cannot pass for an effect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln, xlog1py, xlogy

_HALVINGS = 34
_GRID = 33
_ROUNDS = 4
"""Of narrowing a bound down to a 32nd each: to two millionths."""


@dataclass(frozen=True)
class Counts:
    """Sums of values in [0, 1] and their numbers; float64, phases along the first axis."""

    control_hits: NDArray[np.float64]
    control: NDArray[np.float64]
    treatment_hits: NDArray[np.float64]
    treatment: NDArray[np.float64]

    def difference(self, scale: float) -> NDArray[np.float64]:
        """The observed ``q - scale * p`` of each phase; both arms have values in it."""
        return self.treatment_hits / self.treatment - scale * self.control_hits / self.control


def log_evidence(
    counts: Counts, scale: float, claim: Any, side: Literal["above", "below"]
) -> NDArray[np.float64]:
    """Log evidence that ``q - scale * p`` lies above (below) ``claim``.

    Args:
        counts: arrays ``[phases, ...]``, at least one value of each arm in every phase.
        scale: positive.
        claim: ``[...]``, between ``-scale`` and 1.
        side: ``above`` tests "at most ``claim`` in every phase".
    """
    mixed = _log_mixture(counts.control_hits.sum(0), counts.control.sum(0)) + _log_mixture(
        counts.treatment_hits.sum(0), counts.treatment.sum(0)
    )
    seen = counts.difference(scale)
    nearest = np.minimum(claim, seen) if side == "above" else np.maximum(claim, seen)
    return np.asarray(mixed - _best_likelihood(counts, scale, nearest).sum(0))


def bound(counts: Counts, scale: float, alpha: float, side: Literal["above", "below"]) -> float:
    """Where ``q - scale * p`` lies above (a lower bound) or below (an upper one).

    Args:
        counts: arrays ``[phases]``.
        scale: positive.
        alpha: chance that the bound is ever false.
        side: ``above``: the lower bound; ``below``: the upper one.
    """
    column = Counts(
        counts.control_hits[:, None],
        counts.control[:, None],
        counts.treatment_hits[:, None],
        counts.treatment[:, None],
    )
    # From the outermost claim inwards: the first that is not refuted lies just inside the bound.
    outer, inner = (-scale, 1.0) if side == "above" else (1.0, -scale)
    for _ in range(_ROUNDS):
        grid = np.linspace(outer, inner, _GRID)
        refuted = log_evidence(column, scale, grid[1:-1], side) >= -math.log(alpha)
        i = len(refuted) if refuted.all() else int(refuted.argmin())
        outer, inner = float(grid[i]), float(grid[i + 1])
    return outer


def _log_mixture(hits: NDArray[np.float64], trials: NDArray[np.float64]) -> Any:
    return betaln(0.5 + hits, 0.5 + trials - hits) - betaln(0.5, 0.5)


def _best_likelihood(
    counts: Counts, scale: float, difference: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Largest log-likelihood of both arms over pairs of rates with this difference.

    It is concave in the control rate p: halve the interval by the sign of the derivative.
    """
    hits, misses = counts.control_hits, counts.control - counts.control_hits
    t_hits, t_misses = counts.treatment_hits, counts.treatment - counts.treatment_hits
    low = np.maximum(0.0, -difference / scale)
    high = np.minimum(1.0, (1 - difference) / scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(_HALVINGS):
            p = (low + high) / 2
            q = scale * p + difference
            slope = hits / p - misses / (1 - p) + scale * (t_hits / q - t_misses / (1 - q))
            low, high = np.where(slope > 0, p, low), np.where(slope > 0, high, p)
    p = (low + high) / 2
    q = np.clip(scale * p + difference, 0.0, 1.0)
    found = xlogy(hits, p) + xlog1py(misses, -p) + xlogy(t_hits, q) + xlog1py(t_misses, -q)
    return np.asarray(found)
