"""What a search varies: two matrices for each group of layers, and the plan that they mean.

methods.md, section 2.2: new expert j is the sum over i of merge[j, i] * expert i (W_EM), its
routing score the sum of router_map[j, i] * p_i (W_RM). While pruning, both are the same one-hot
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from liveprune.pruning.allocation import select
from liveprune.pruning.budget import LayerBudget, layer_budgets, parse_budget
from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import ModelSpec, Router
from liveprune.pruning.plan import LayerPlan, Lineage, Matrix, Plan
from liveprune.pruning.plan_guards import check_plan
from liveprune.pruning.search.presets import Settings


@dataclass(frozen=True, eq=False)
class Genome:
    """Coefficients of all groups; matrices are shared between genomes and never written to."""

    merge: tuple[Matrix, ...]
    """W_EM of each group: float32 [kept, experts]."""
    router_map: tuple[Matrix, ...]
    """W_RM of each group, of the same shape."""


@dataclass(frozen=True)
class Group:
    """Consecutive layers with experts that share coefficients."""

    budgets: tuple[LayerBudget, ...]

    @property
    def kept(self) -> int:
        return self.budgets[0].keep

    @property
    def experts(self) -> int:
        return self.budgets[0].layer.experts

    @property
    def layers(self) -> list[int]:
        """Indices among all decoder layers."""
        return [budget.layer.index for budget in self.budgets]


@dataclass(frozen=True)
class Space:
    """The genomes that a search may try, and how they become plans."""

    spec: ModelSpec
    groups: tuple[Group, ...]
    literal: bool
    """Pruning keeps the softmax over all experts where the router does not renormalise."""
    base_model: str = ""

    @cached_property
    def prunes(self) -> bool:
        """Some layer is to lose experts."""
        return any(group.kept < group.experts for group in self.groups)

    def plan(self, genome: Genome, lineage: Lineage | None = None) -> Plan:
        """The plan that a genome means; genomes that differ only in row order give equal plans.

        A layer whose matrices are the same distinct one-hot rows becomes a pruned layer where that
        is exact: the router renormalises, nothing is dropped, or slicing is what was asked for.
        """
        layers = []
        for group, merge, router_map in zip(
            self.groups, genome.merge, genome.router_map, strict=True
        ):
            kept = picked(merge, router_map)
            sliced = self.spec.router.renormalise or not self.literal
            if kept is not None and (sliced or len(kept) == group.experts):
                form: dict[str, object] = {"kept": kept}
            elif kept is not None:
                rows = one_hot(kept, group.experts)
                form = {"merge": rows, "router_map": rows}
            else:
                form = {"merge": merge, "router_map": router_map}
            layers += [
                LayerPlan(b.layer.index, b.layer.experts, b.top_k, **form)  # type: ignore[arg-type]
                for b in group.budgets
            ]
        return Plan(
            architecture=self.spec.architecture.model_type,
            num_hidden_layers=self.spec.num_hidden_layers,
            layers=tuple(layers),
            lineage=lineage or Lineage("eep"),
            base_model=self.base_model,
        )

    def closest(self, plan: Plan) -> Genome:
        """The pruning that keeps in each group what most of its layers keep in a pruned plan.

        Of equal votes the lower expert stays; each of the router's groups keeps its number.

        Raises:
            PlanError: the plan merges experts, or is not of this model.
        """
        check_plan(plan, self.spec)
        if plan.merges:
            raise PlanError("start: found a plan that merges experts, expected one that keeps some")
        rows = []
        for group in self.groups:
            votes = np.zeros(group.experts)
            for index in group.layers:
                votes[list(plan.layer(index).kept)] += 1
            kept = select(votes, group.kept, self.spec.router, group.layers[0])
            rows.append(one_hot(kept, group.experts))
        return Genome(tuple(rows), tuple(rows))


def one_hot(experts: Sequence[int], width: int) -> Matrix:
    """Float32 [len(experts), width] with a one in row j at ``experts[j]``."""
    rows = np.zeros((len(experts), width), np.float32)
    rows[np.arange(len(experts)), list(experts)] = 1
    return rows


def picked(merge: Matrix, router_map: Matrix) -> tuple[int, ...] | None:
    """The experts kept, ascending, where both matrices are the same distinct one-hot rows."""
    ids = merge.argmax(axis=1)
    distinct = len(set(ids.tolist())) == len(ids)
    same = np.array_equal(merge, router_map)
    if not same or not distinct or not np.array_equal(merge, one_hot(ids.tolist(), merge.shape[1])):
        return None
    return tuple(sorted(ids.tolist()))


def make_space(
    spec: ModelSpec,
    settings: Settings,
    *,
    experts: str | float | Sequence[int],
    top_k: int | None = None,
    base_model: str = "",
) -> Space:
    """Lay out the search, and refuse what could not be served or searched.

    Raises:
        PlanError: the budget does not fit the model or its router, groups mix layers of different
            sizes, or the router cannot take what the search would ask of it.
    """
    literal = _literal(spec.router, settings)
    budgets = layer_budgets(spec, parse_budget(experts), top_k=top_k)
    space = Space(spec, _groups(budgets, settings), literal, base_model)
    if not space.prunes and not settings.merge:
        raise PlanError("experts keeps all of every layer, and merge is off: nothing to search")
    # Stand-ins for what the stages will try.
    rows = [one_hot(_spread(group, spec.router), group.experts) for group in space.groups]
    stand_ins = [Genome(tuple(rows), tuple(rows))] if space.prunes else []
    if settings.merge:
        scaled = tuple(0.5 * matrix for matrix in rows)
        stand_ins.append(Genome(scaled, scaled))
    for genome in stand_ins:
        check_plan(space.plan(genome), spec)
    return space


def _literal(router: Router, settings: Settings) -> bool:
    if router.scoring == "softmax" and router.groups == 1:
        return settings.semantics != "slice"
    found = f"this model routes by {router.scoring} in {router.groups} group(s)"
    if settings.merge:
        raise PlanError(
            f"merge is on: {found}, expected softmax without groups, which is what router maps act "
            f"on; with merge off such a model can still be pruned"
        )
    if settings.semantics == "literal":
        raise PlanError(f"semantics is 'literal': {found}; expected 'slice'")
    return False


def _groups(budgets: Sequence[LayerBudget], settings: Settings) -> tuple[Group, ...]:
    count = settings.groups
    if count is None:
        count = min(4, len(budgets))
    elif count == "each":
        count = len(budgets)
    if count > len(budgets):
        raise PlanError(
            f"groups is {count}, expected at most {len(budgets)}, the layers with experts"
        )
    groups = []
    for run in np.array_split(np.arange(len(budgets)), count):
        members = tuple(budgets[i] for i in run)
        sizes = sorted({(b.keep, b.layer.experts) for b in members})
        if len(sizes) > 1:
            raise PlanError(
                f"groups is {count}: layers {[b.layer.index for b in members]} share matrices but "
                f"are to keep {' and '.join(f'{k} of {e}' for k, e in sizes)} experts; expected "
                f"one size per group, e.g. with groups = 'each'"
            )
        groups.append(Group(members))
    return tuple(groups)


def _spread(group: Group, router: Router) -> list[int]:
    """Experts to keep for a stand-in: the first ones of each of the router's groups."""
    size, keep = group.experts // router.groups, group.kept // router.groups
    return [start + i for start in range(0, group.experts, size) for i in range(keep)]
