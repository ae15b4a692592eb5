"""The grid: every method under every budget and top-k, and the controls at the same bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from liveprune.pruning.allocation import global_total
from liveprune.pruning.budget import layer_budgets, parse_budget
from liveprune.pruning.errors import PlanError
from liveprune.pruning.methods import find_method
from liveprune.pruning.model_spec import ModelSpec

CONTROLS = ("random", "frequency")
"""What every method has to beat at the same counts and top-k (methods.md, section 13)."""
RANDOM_SEEDS = 3
"""Fewest seeds of a control that draws: one random pruning says nothing about chance."""

Budget = str | tuple[int, ...]


@dataclass(frozen=True)
class GridPoint:
    """One plan to be made."""

    name: str
    """Of its file, and a variant's tag."""
    method: str
    experts: str
    """Label of the budget, as it was asked for."""
    budget: Budget
    top_k: int | None
    """Active experts; None is the model's."""
    seed: int
    control: bool
    """Not asked for: added to judge the others by."""


@dataclass(frozen=True)
class Skipped:
    """A combination that cannot be made or served."""

    name: str
    reason: str


@dataclass(frozen=True)
class Grid:
    """What is run, in order, and what is not."""

    points: tuple[GridPoint, ...]
    skipped: tuple[Skipped, ...]


def make_grid(
    spec: ModelSpec,
    *,
    methods: Sequence[str],
    budgets: Mapping[str, Budget],
    top_ks: Sequence[int | None] = (None,),
    seeds: int = RANDOM_SEEDS,
    seed: int = 0,
    controls: bool = True,
    calibrated: bool,
    searches: Collection[str] = (),
) -> Grid:
    """Lay the grid out and find what could not be served, before anything runs.

    Args:
        spec: of the base model.
        methods: names from ``METHODS`` or ``searches``.
        budgets: by label; see ``budget``.
        top_ks: active experts; None is the model's.
        seeds: plans of each combination, where the method draws.
        seed: the first of these.
        controls: add ``CONTROLS`` to every combination of budget and top-k.
        calibrated: there are calibration rows.
        searches: methods that are not in ``METHODS``: one plan each, of ``seed``.

    Raises:
        PlanError: a method does not exist, or nothing is left to run.
    """
    for name, number in (("seeds", seeds), ("seed", seed + 1)):
        if number < 1:
            raise PlanError(f"{name} is {number}, expected at least 1")
    asked = list(dict.fromkeys(methods))
    added = [name for name in CONTROLS if name not in asked] if controls else []
    points: list[GridPoint] = []
    skipped: list[Skipped] = []
    for method in (*asked, *added):
        draws = method not in searches and find_method(method).draws
        number = max(seeds, RANDOM_SEEDS if controls and method in CONTROLS else 1) if draws else 1
        for label, budget in budgets.items():
            for top_k in dict.fromkeys(top_ks):
                name = f"{method}-e{label}" + (f"-k{top_k}" if top_k is not None else "")
                reason = _refusal(spec, method, budget, top_k, calibrated, searches)
                if reason is not None:
                    skipped.append(Skipped(name, reason))
                    continue
                points += [
                    GridPoint(
                        name=f"{name}-s{own}" if draws else name,
                        method=method,
                        experts=label,
                        budget=budget,
                        top_k=top_k,
                        seed=own,
                        control=method in added,
                    )
                    for own in range(seed, seed + number)
                ]
    if not any(not point.control for point in points):
        reason = f"; {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise PlanError(f"methods, experts and top_k: found nothing that can be run{reason}")
    return Grid(tuple(points), tuple(skipped))


def _refusal(
    spec: ModelSpec,
    name: str,
    budget: Budget,
    top_k: int | None,
    calibrated: bool,
    searches: Collection[str],
) -> str | None:
    allocate = "uniform"
    if name not in searches:
        method = find_method(name)
        if method.needs_calibration and not calibrated:
            return f"method {name} needs calibration rows: found none"
        allocate = method.allocate if isinstance(budget, str) else "uniform"
    try:
        parsed = parse_budget(budget)
        budgets = layer_budgets(spec, parsed, top_k=top_k, allocate=allocate)
        if allocate == "global":
            global_total(budgets, parsed, spec.router)
    except PlanError as error:
        return str(error)
    return None
