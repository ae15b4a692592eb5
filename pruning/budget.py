"""Budgets: how many experts each layer keeps, and which.

A budget is given as

* a count, ``4`` or ``"4"``: experts kept in every layer;
* a fraction, ``0.5`` or ``"0.5"``: the part kept. ``E - floor(E * (1 - fraction))`` experts stay,
  so that the number pruned is rounded down, as in REAP (methods.md, section 5.2);
* a list, ``[4, 4, 8, 6]`` or ``"4,4,8,6"``: one count per layer with experts;
* ranges of decoder layers, ``"0-7:4,8-23:6,24-:8"``: a count for each, every layer with experts
  named once.

The type decides, not the size: ``1`` keeps one expert, ``1.0`` keeps all.

Routers that pick groups of experts first need the same number in each group. All arithmetic is
therefore done in units: one expert in every group, or simply one expert where there are no groups.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import ModelSpec, MoELayer, Router


@dataclass(frozen=True)
class LayerRange:
    """A run of decoder layers that keep as many experts each."""

    first: int
    last: int | None
    """Included; None: to the end."""
    count: int

    def __contains__(self, index: int) -> bool:
        return self.first <= index and (self.last is None or index <= self.last)

    def __str__(self) -> str:
        last = "" if self.last is None else self.last
        return f"{self.first}-{last}:{self.count}"


@dataclass(frozen=True)
class Budget:
    """Experts to keep; exactly one form is set."""

    count: int | None = None
    fraction: Fraction | None = None
    counts: tuple[int, ...] | None = None
    ranges: tuple[LayerRange, ...] | None = None
    total: int | None = None
    """In all layers together that are not skipped; for allocation across layers only."""


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
    capacity: int | None = None
    """Most experts that it may keep; None: all of them."""

    @property
    def ceiling(self) -> int:
        """Most experts that it may keep."""
        return self.layer.experts if self.capacity is None else self.capacity


def parse_budget(value: str | float | Sequence[int]) -> Budget:
    """Read a budget in any of its forms.

    Raises:
        PlanError: it is none of them.
    """
    if isinstance(value, str) and ":" in value:
        return Budget(ranges=_parse_ranges(value))
    parsed: object = _parse_text(value) if isinstance(value, str) else value
    if isinstance(parsed, float) and 0 < parsed <= 1:
        # Through the decimal form: 0.9 means nine tenths, not the binary number next to it.
        return Budget(fraction=Fraction(repr(parsed)))
    if isinstance(parsed, int) and _is_count(parsed):
        return Budget(count=parsed)
    if isinstance(parsed, Sequence) and parsed and all(_is_count(item) for item in parsed):
        return Budget(counts=tuple(parsed))
    raise PlanError(
        f"experts is {value!r}, expected a count such as 4, a fraction kept such as 0.5, a list "
        f"of counts such as 4,4,8,6, or ranges of layers such as 0-7:4,8-:6"
    )


def _parse_ranges(text: str) -> tuple[LayerRange, ...]:
    ranges = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(-(\d*))?:(\d+)\s*", part)
        if found is None or int(found[4]) < 1:
            raise PlanError(
                f"experts is {text!r}: found {part!r}, expected layers and a count such as 0-7:4, "
                f"8:6 or 9-:8"
            )
        first = int(found[1])
        last = first if found[2] is None else int(found[3]) if found[3] else None
        ranges.append(LayerRange(first, last, int(found[4])))
    return tuple(ranges)


def _counts_of(ranges: Sequence[LayerRange], layers: Sequence[MoELayer]) -> tuple[int, ...]:
    counts = []
    for layer in layers:
        named = [x for x in ranges if layer.index in x]
        if len(named) != 1:
            stated = " and ".join(map(str, named)) or "nothing"
            raise PlanError(
                f"experts: layer {layer.index} is stated by {stated}, expected one range"
            )
        counts.append(named[0].count)
    idle = [str(x) for x in ranges if not any(layer.index in x for layer in layers)]
    if idle:
        raise PlanError(
            f"experts: {', '.join(idle)} names no layer with experts, expected some of "
            f"{[layer.index for layer in layers]}"
        )
    return tuple(counts)


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
    least: int | None = None,
    most: int | None = None,
    allowed: Collection[int] | None = None,
) -> tuple[LayerBudget, ...]:
    """Work out what each layer keeps, and refuse what could not be served.

    ``top_k`` None keeps the model's; a number holds for all layers but the skipped, a list has
    one per layer with experts. It is lowered only on request: a layer that would keep fewer
    experts than top-k is refused. ``least`` and ``most`` bound what allocation across layers
    gives a layer. ``allowed`` are the counts to choose from, where not all will do: each layer
    keeps the next lower one (see ``snap``).

    Raises:
        PlanError: naming the layer, the number found and the number expected.
    """
    if budget.ranges is not None:
        budget = Budget(counts=_counts_of(budget.ranges, spec.layers))
    indices = [layer.index for layer in spec.layers]
    unknown = sorted(set(skip_layers) - set(indices))
    if unknown:
        raise PlanError(f"skip_layers is {unknown}, expected some of the MoE layers {indices}")
    _check_allocation(budget, allocate, bounded=least is not None or most is not None)
    for name, values in (("experts", budget.counts), ("top_k", top_k)):
        if isinstance(values, Sequence) and len(values) != len(indices):
            raise PlanError(
                f"{name} lists {len(values)} layers, expected the {len(indices)} with experts: "
                f"{indices}"
            )
    budgets = []
    for place, layer in enumerate(spec.layers):
        k = _top_k(layer, top_k, place, skipped=layer.index in skip_layers)
        skipped = layer.index in skip_layers
        keep = _keep(layer, budget, place, spec.router, skipped=skipped)
        floor = min(layer.experts, _floor(k, spec.router))
        item = LayerBudget(layer, keep, k, floor, skipped)
        budgets.append(item if skipped else _bounded(item, least, most, spec.router))
    if allocate == "uniform":
        if allowed is not None:
            budgets = [snap(item, allowed) for item in budgets]
        for item in budgets:
            _check_floor(item, item.keep, spec.router)
    return tuple(budgets)


def _check_allocation(budget: Budget, allocate: str, *, bounded: bool) -> None:
    if allocate not in ("uniform", "global"):
        raise PlanError(f"allocate is {allocate!r}, expected 'uniform' or 'global'")
    if allocate == "global" and budget.counts is not None:
        raise PlanError("allocate is 'global' and experts a list per layer; expected one of them")
    if allocate != "global" and bounded:
        raise PlanError("found bounds of a layer's experts, expected them with allocate 'global'")


def snap(item: LayerBudget, allowed: Collection[int]) -> LayerBudget:
    """Lower what a layer keeps to the next allowed count; a layer that keeps all is left alone.

    Raises:
        PlanError: no allowed count lies between its floor and what it may keep.
    """
    if item.keep == item.layer.experts:
        return item
    fitting = [count for count in allowed if item.floor <= count <= item.keep]
    if not fitting:
        raise PlanError(
            f"layer {item.layer.index}: no count from {item.floor} to {item.keep} is allowed, "
            f"expected one of {sorted(allowed)}"
        )
    return dataclasses.replace(item, keep=max(fitting))


def _bounded(item: LayerBudget, least: int | None, most: int | None, router: Router) -> LayerBudget:
    """Within ``least`` and ``most`` experts, as far as the layer has them."""
    layer, floor, capacity = item.layer, item.floor, None
    if least is not None:
        floor = max(floor, _bound("min_experts", least, layer, router, up=True))
    if most is not None:
        capacity = _bound("max_experts", most, layer, router, up=False)
        if capacity < floor:
            raise PlanError(
                f"layer {layer.index}: max_experts is {most}, expected at least {floor}"
            )
    return dataclasses.replace(item, floor=floor, capacity=capacity)


def _bound(name: str, value: int, layer: MoELayer, router: Router, *, up: bool) -> int:
    """A bound in whole units of the router's groups, at most all experts."""
    if not _is_count(value):
        raise PlanError(f"{name} is {value!r}, expected a whole number from 1")
    units = -(-value // router.groups) if up else value // router.groups
    return min(layer.experts, units * router.groups)


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


def kept_units(units: int, fraction: Fraction) -> int:
    """What stays of so many, the number that goes rounded down."""
    return units - math.floor(units * (1 - fraction))


def _keep(layer: MoELayer, budget: Budget, place: int, router: Router, *, skipped: bool) -> int:
    if budget.total is not None or (skipped and budget.counts is None):
        return layer.experts
    if budget.fraction is not None:
        return router.groups * kept_units(layer.experts // router.groups, budget.fraction)
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
