"""Allocation: one total of experts shared out over the layers, and who stays in each.

All arithmetic is done in units: one expert in every group of the router, or one expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from liveprune.pruning.budget import Budget, LayerBudget, kept_units
from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import Router

Scores = npt.NDArray[np.float64]


def global_total(budgets: Sequence[LayerBudget], budget: Budget, router: Router) -> int:
    """Experts kept in all layers that are not skipped, for an allocation across layers.

    A fraction is taken of the sum, a count is meant per layer on average.

    Raises:
        PlanError: fewer than the layers' floors add up to, or more than their ceilings do.
    """
    open_layers = [item for item in budgets if not item.skipped]
    if budget.total is not None:
        total = budget.total
    elif budget.fraction is None:
        total = sum(item.keep for item in open_layers)
    else:
        units = sum(item.layer.experts // router.groups for item in open_layers)
        total = router.groups * kept_units(units, budget.fraction)
    floors = sum(item.floor for item in open_layers)
    if total < floors:
        raise PlanError(
            f"experts: {total} kept in {len(open_layers)} layers, expected at least {floors}, the "
            f"sum of what each needs for its top_k and its super experts, if these are kept"
        )
    ceilings = sum(item.ceiling for item in open_layers)
    if total > ceilings:
        raise PlanError(
            f"experts: {total} kept in {len(open_layers)} layers, expected at most {ceilings}, the "
            f"sum of their capacities"
        )
    return total


def allocate_global(
    budgets: Sequence[LayerBudget], scores: Mapping[int, Scores], total: int, router: Router
) -> dict[int, int]:
    """Share ``total`` experts out over the layers that are not skipped; counts by layer index.

    Scores are divided by their layer's mean, so that layers of other scales compare, and pooled;
    the lowest unit goes first, as long as its layer stays above its floor; what lies above a
    layer's ceiling goes in any case. A layer whose scores are concentrated on few experts thus
    gives up more than one whose experts are all alike.

    Raises:
        PlanError: scores are negative, which shares cannot compare.
    """
    counts = {item.layer.index: item.layer.experts for item in budgets}
    pool = []
    removals = sum(item.layer.experts for item in budgets if not item.skipped) - total
    for item in budgets:
        if not item.skipped:
            index = item.layer.index
            shares = _unit_shares(scores[index], router.groups, index)
            removable = (item.layer.experts - item.floor) // router.groups
            must = (item.layer.experts - item.ceiling) // router.groups
            counts[index] -= must * router.groups
            removals -= must * router.groups
            pool += [(share, index) for share in shares[must:removable]]
    for _, index in sorted(pool)[: removals // router.groups]:
        counts[index] -= router.groups
    return counts


def proportional(
    shares: Mapping[int, Fraction], caps: Mapping[int, int], total: int
) -> dict[int, int]:
    """Whole numbers in proportion to ``shares``, none above its cap, that sum up to ``total``.

    What is beyond a cap goes to the others in their proportion; parts are settled by largest
    remainders, of equal ones the earlier's. The caps hold the total, and no share is 0.
    """
    counts: dict[int, int] = {}
    open_layers = list(shares)
    while True:
        left = total - sum(counts.values())
        whole = sum(shares[i] for i in open_layers)
        quotas = {i: left * shares[i] / whole for i in open_layers}
        full = [i for i in open_layers if quotas[i] >= caps[i]]
        if not full:
            break
        counts |= {i: caps[i] for i in full}
        open_layers = [i for i in open_layers if i not in full]
    counts |= {i: math.floor(quotas[i]) for i in open_layers}
    # Stable, so that of equal remainders the earlier layer's comes first.
    by_remainder = sorted(open_layers, key=lambda i: math.floor(quotas[i]) - quotas[i])
    for i in by_remainder[: total - sum(counts.values())]:
        counts[i] += 1
    return counts


def select(scores: Scores, keep: int, router: Router, layer: int) -> tuple[int, ...]:
    """The ids of the ``keep`` experts with the highest scores, an equal number in each group.

    Of equal scores the lower id stays. Ids ascend.

    Raises:
        PlanError: a score is NaN.
    """
    if np.isnan(scores).any():
        raise PlanError(f"layer {layer}: scores hold NaN at {np.flatnonzero(np.isnan(scores))}")
    size = len(scores) // router.groups
    kept: list[int] = []
    for start in range(0, len(scores), size):
        order = np.argsort(-scores[start : start + size], kind="stable")
        kept += (start + order[: keep // router.groups]).tolist()
    return tuple(sorted(kept))


def _unit_shares(scores: Scores, groups: int, layer: int) -> list[float]:
    """Shares of a layer's units in the order they would be removed, lowest first."""
    finite = np.where(np.isfinite(scores), scores, 0.0)
    if (finite < 0).any():
        raise PlanError(
            f"layer {layer}: found the score {finite.min():g}; allocation across layers expects "
            f"scores of at least 0"
        )
    # -inf means never hit: first within the layer, a share of nothing. inf means protected.
    ordinary = finite[scores < np.inf]
    mean = ordinary.mean() if len(ordinary) else 0.0
    shares = finite / mean if mean > 0 else finite
    order = np.argsort(scores.reshape(groups, -1), axis=1, kind="stable")
    in_order = np.take_along_axis(shares.reshape(groups, -1), order, axis=1).sum(axis=0)
    return [float(share) for share in np.maximum.accumulate(in_order)]
