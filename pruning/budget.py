"""Budgets: how many experts each layer keeps, and which.

A budget is given as

* a count, ``4`` or ``"4"``: experts kept in every layer;
* a fraction, ``0.5`` or ``"0.5"``: the part kept. ``E - floor(E * (1 - fraction))`` experts stay,
  so that the number pruned is rounded down, as in REAP (methods.md, section 5.2);
* a list, ``[4, 4, 8, 6]`` or ``"4,4,8,6"``: one count per layer with experts.

The type decides, not the size: ``1`` keeps one expert, ``1.0`` keeps all.

Routers that pick groups of experts first need the same number in each group. All arithmetic is
therefore done in units: one expert in every group, or simply one expert where there are no groups.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import ModelSpec, MoELayer, Router

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Budget:
    """Experts to keep; exactly one form is set."""

    count: int | None = None
    fraction: Fraction | None = None
    counts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LayerBudget:
    """What one layer is to keep."""

    layer: MoELayer
    keep: int
    """Experts to keep; under global allocation the layer's part of the total before it moves."""
    top_k: int
    floor: int
    """Fewest experts with which the layer can be served, given ``top_k`` and the groups."""
    skipped: bool
    """Left as it is."""


def parse_budget(value: str | float | Sequence[int]) -> Budget:
    """Read a budget in any of its forms.

    Raises:
        PlanError: it is none of them.
    """
    parsed: object = _parse_text(value) if isinstance(value, str) else value
    if isinstance(parsed, float) and 0 < parsed <= 1:
        # Through the decimal form: 0.9 means nine tenths, not the binary number next to it.
        return Budget(fraction=Fraction(repr(parsed)))
    if isinstance(parsed, int) and _is_count(parsed):
        return Budget(count=parsed)
    if isinstance(parsed, Sequence) and parsed and all(_is_count(item) for item in parsed):
        return Budget(counts=tuple(parsed))
    raise PlanError(
        f"experts is {value!r}, expected a count such as 4, a fraction kept such as 0.5, or a list "
        f"of counts such as 4,4,8,6"
    )


def _parse_text(text: str) -> float | list[int] | None:
    try:
        if "," in text:
            return [int(part) for part in text.split(",")]
        return float(text) if "." in text else int(text)
    except ValueError:
        return None


def layer_budgets(
    spec: ModelSpec,
    budget: Budget,
    *,
    top_k: int | Sequence[int] | None = None,
    skip_layers: Collection[int] = (),
    allocate: str = "uniform",
) -> tuple[LayerBudget, ...]:
    """Work out what each layer keeps, and refuse what could not be served.

    ``top_k`` None keeps the model's; a number holds for all layers but the skipped, a list has
    one per layer with experts. It is lowered only on request: a layer that would keep fewer
    experts than top-k is refused.

    Raises:
        PlanError: naming the layer, the number found and the number expected.
    """
    indices = [layer.index for layer in spec.layers]
    unknown = sorted(set(skip_layers) - set(indices))
    if unknown:
        raise PlanError(f"skip_layers is {unknown}, expected some of the MoE layers {indices}")
    if allocate not in ("uniform", "global"):
        raise PlanError(f"allocate is {allocate!r}, expected 'uniform' or 'global'")
    if allocate == "global" and budget.counts is not None:
        raise PlanError("allocate is 'global' and experts a list per layer; expected one of them")
    for name, values in (("experts", budget.counts), ("top_k", top_k)):
        if isinstance(values, Sequence) and len(values) != len(indices):
            raise PlanError(
                f"{name} lists {len(values)} layers, expected the {len(indices)} with experts: "
                f"{indices}"
            )
    budgets = []
    for place, layer in enumerate(spec.layers):
        k = _top_k(layer, top_k, place, skipped=layer.index in skip_layers)
        keep = _keep(layer, budget, place, spec.router, skipped=layer.index in skip_layers)
        floor = min(layer.experts, _floor(k, spec.router))
        budgets.append(LayerBudget(layer, keep, k, floor, layer.index in skip_layers))
    if allocate == "uniform":
        for item in budgets:
            _check_floor(item, item.keep, spec.router)
    else:
        global_total(budgets, budget, spec.router)
    return tuple(budgets)


def _check_floor(budget: LayerBudget, keep: int, router: Router) -> None:
    if keep >= budget.floor:
        return
    reason = f"top_k = {budget.top_k}; a lower top_k must be asked for"
    if router.groups > 1:
        reason = f"{reason}; {router.groups} groups, {router.top_groups} of them picked per token"
    raise PlanError(
        f"layer {budget.layer.index}: keeps {keep} of {budget.layer.experts} experts, expected at "
        f"least {budget.floor} ({reason})"
    )


def global_total(budgets: Sequence[LayerBudget], budget: Budget, router: Router) -> int:
    """Experts kept in all layers that are not skipped, for an allocation across layers.

    A fraction is taken of the sum, a count is meant per layer on average.

    Raises:
        PlanError: fewer than the layers' floors add up to.
    """
    open_layers = [item for item in budgets if not item.skipped]
    if budget.fraction is None:
        total = sum(item.keep for item in open_layers)
    else:
        units = sum(item.layer.experts // router.groups for item in open_layers)
        total = router.groups * _kept_units(units, budget.fraction)
    floors = sum(item.floor for item in open_layers)
    if total < floors:
        raise PlanError(
            f"experts: {total} kept in {len(open_layers)} layers, expected at least {floors}, the "
            f"sum of what each needs for its top_k and its super experts, if these are kept"
        )
    return total


def allocate_global(
    budgets: Sequence[LayerBudget], scores: Mapping[int, Scores], total: int, router: Router
) -> dict[int, int]:
    """Share ``total`` experts out over the layers that are not skipped; counts by layer index.

    Scores are divided by their layer's mean, so that layers of other scales compare, and pooled;
    the lowest unit goes first, as long as its layer stays above its floor. A layer whose scores
    are concentrated on few experts thus gives up more than one whose experts are all alike.

    Raises:
        PlanError: scores are negative, which shares cannot compare.
    """
    counts = {item.layer.index: item.layer.experts for item in budgets}
    pool = []
    for item in budgets:
        if not item.skipped:
            index = item.layer.index
            shares = _unit_shares(scores[index], router.groups, index)
            removable = (item.layer.experts - item.floor) // router.groups
            pool += [(share, index) for share in shares[:removable]]
    removals = sum(item.layer.experts for item in budgets if not item.skipped) - total
    for _, index in sorted(pool)[: removals // router.groups]:
        counts[index] -= router.groups
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


def _kept_units(units: int, fraction: Fraction) -> int:
    return units - math.floor(units * (1 - fraction))


def _keep(layer: MoELayer, budget: Budget, place: int, router: Router, *, skipped: bool) -> int:
    if skipped and budget.counts is None:
        return layer.experts
    if budget.fraction is not None:
        return router.groups * _kept_units(layer.experts // router.groups, budget.fraction)
    keep = budget.counts[place] if budget.counts is not None else budget.count
    if keep is None or keep > layer.experts or (skipped and keep != layer.experts):
        expected = f"{layer.experts} (skipped)" if skipped else f"1 to {layer.experts}"
        raise PlanError(f"layer {layer.index}: experts is {keep}, expected {expected}")
    if keep % router.groups:
        raise PlanError(
            f"layer {layer.index}: experts is {keep}, expected a multiple of {router.groups}, the "
            f"router's groups"
        )
    return keep


def _top_k(layer: MoELayer, top_k: int | Sequence[int] | None, place: int, *, skipped: bool) -> int:
    if top_k is None or (skipped and not isinstance(top_k, Sequence)):
        return layer.top_k
    k = top_k[place] if isinstance(top_k, Sequence) else top_k
    if not _is_count(k) or k > layer.top_k or (skipped and k != layer.top_k):
        expected = f"{layer.top_k} (skipped)" if skipped else f"1 to {layer.top_k}"
        raise PlanError(f"layer {layer.index}: top_k is {k!r}, expected {expected}")
    return k


def _floor(top_k: int, router: Router) -> int:
    return router.groups * max(router.group_top, math.ceil(top_k / router.top_groups))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
