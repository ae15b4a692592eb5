"""Sample-ratio mismatch: do the arms have the units that their shares promise?

If not, something loses units of one arm, and no comparison means anything. The test is the
Dirichlet-multinomial mixture of Lindon and Malek, "Anytime-valid inference for multinomial count
data" (NeurIPS 2022), over distinct units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import gammaln

CONCENTRATION = 100.0
"""Of the mixture about the expected shares: large enough to see small mismatches early."""


@dataclass(frozen=True)
class UnitCounts:
    """Distinct units of one phase."""

    counts: dict[str, int]
    """Arm to units."""
    shares: dict[str, int]
    """Arm to its share in millionths."""
    level: int = 0
    """Units were sampled at ``2 ** -level`` (``UnitSample``)."""


def log_mismatch(counts: Mapping[str, int], shares: Mapping[str, float]) -> float:
    """Log of the martingale against "units fall into arms by these shares".

    ``Gamma(c) / Gamma(c + n) * prod_i Gamma(c s_i + n_i) / Gamma(c s_i) / s_i^n_i``; infinite if
    an arm without a share has units.

    Args:
        counts: arm to units.
        shares: arm to share; they sum to 1.
    """
    if any(count and not shares.get(arm) for arm, count in counts.items()):
        return math.inf
    found = gammaln(CONCENTRATION) - gammaln(CONCENTRATION + sum(counts.values()))
    for arm, share in shares.items():
        count, weight = counts.get(arm, 0), CONCENTRATION * share
        if count:
            found += gammaln(weight + count) - gammaln(weight) - count * math.log(share)
    return float(found)


def mismatch_p(phases: Sequence[UnitCounts]) -> float:
    """Always-valid p-value: the chance that it ever falls to alpha is at most alpha.

    Each phase, and each level of sampling within it, begins a martingale of its own. The chances
    ``1 / (i + 1) / (i + 2)`` for i = 0, 1, 2, ... sum to 1 and share alpha out over them.
    """
    found = 1.0
    for i, phase in enumerate(phases):
        total = sum(phase.shares.values())
        shares = {arm: ppm / total for arm, ppm in phase.shares.items()}
        shared_out = spending(i) * spending(phase.level)
        log = log_mismatch(phase.counts, shares)
        found = min(found, math.exp(min(0.0, -log - math.log(shared_out))))
    return found


def spending(i: int) -> float:
    """The part of alpha for the i-th of an endless row: 1/2, 1/6, 1/12, ..."""
    return 1 / (i + 1) / (i + 2)
