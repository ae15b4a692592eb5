"""From scores to layers: who is protected, how many stay, and what becomes of those that go."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from liveprune.pruning.allocation import allocate_global, select
from liveprune.pruning.budget import LayerBudget, snap
from liveprune.pruning.errors import PlanError
from liveprune.pruning.evidence import Evidence
from liveprune.pruning.methods.method import Folding, Method, Options
from liveprune.pruning.methods.moeits_plan import (
    compare_experts,
    counts_by_tau,
    ranks,
    removals_to_json,
)
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan

if TYPE_CHECKING:
    from liveprune.pruning.methods.method import Scores
    from liveprune.pruning.methods.moeits_removals import Removals

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class Request:
    """What is asked of a method, checked."""

    method: Method
    spec: ModelSpec
    budgets: Sequence[LayerBudget]
    total: int | None
    """Experts to keep in all layers that are not skipped; None: each layer as its budget says."""
    allocator: Allocator | None
    """Shares the total out; None: by the scores themselves."""
    allowed_counts: Collection[int] | None
    """That a pruned layer may have; None: any."""
    options: Options
    keep_gate_rows: bool
    keep_super_experts: bool
    tau: float | None
    nmi: str
    seed: int


class Allocator(Protocol):
    """Decides how many experts each layer keeps, once they have been ranked."""

    name: str
    """For the lineage."""

    def counts(
        self, budgets: Sequence[LayerBudget], ranked: Mapping[int, Scores], total: int
    ) -> dict[int, int]:
        """Experts kept by layer index; those of layers that are not skipped sum up to ``total``.

        Args:
            budgets: of all layers, with floors and ceilings.
            ranked: [experts] by layer index, higher = keep; infinite where protected.
            total: in all layers that are not skipped.
        """

    def facts(self) -> dict[str, Any]:
        """What led to the counts, as JSON."""


def by_ranking(
    request: Request, evidence: Evidence, progress: Progress | None
) -> tuple[dict[int, LayerPlan], dict[str, Any]]:
    """Layers by index, and the scores that led to them as JSON.

    Raises:
        PlanError: protected experts do not fit the budget, or scores are unusable.
    """
    method, router = request.method, request.spec.router
    removals: dict[int, Removals] = {}
    if method.from_pairs is not None and evidence.weights is not None:
        removals = compare_experts(
            method, evidence.weights, request.budgets, request.nmi, request.seed, progress
        )
        scores = ranks(removals, request.budgets)
    else:
        scores = _scores(request, evidence, progress)
    protected = _super_experts(evidence) if request.keep_super_experts else {}
    budgets, ranked = _protect(request.budgets, scores, protected, request.spec)
    counts = _counts(request, budgets, ranked)
    if request.tau is not None:
        counts = counts_by_tau(removals, request.tau, budgets, protected)
    _check_protected(budgets, counts, protected)
    kept = {i: select(ranked[i], count, router, i) for i, count in counts.items()}
    layers = sliced(budgets, kept)
    if method.fold is not None:
        for item in budgets:
            index = item.layer.index
            if len(kept[index]) < item.layer.experts:
                folding = _folding(request, evidence, item, kept[index], ranked[index])
                layers[index] = method.fold(folding)
    form = _scores_to_json(scores, protected)
    if removals:
        form["removals"] = removals_to_json(removals, request.tau, counts)
    if request.allocator is not None:
        form["allocation"] = request.allocator.facts()
    return layers, form


def _counts(
    request: Request, budgets: Sequence[LayerBudget], ranked: Mapping[int, Scores]
) -> dict[int, int]:
    """How many experts each layer keeps."""
    if request.total is None:
        return {item.layer.index: item.keep for item in budgets}
    if request.allocator is not None:
        counts = request.allocator.counts(budgets, ranked, request.total)
    else:
        counts = allocate_global(budgets, ranked, request.total, request.spec.router)
    if request.allowed_counts is None:
        return counts
    given = (dataclasses.replace(x, keep=counts[x.layer.index]) for x in budgets)
    return {x.layer.index: snap(x, request.allowed_counts).keep for x in given}


def sliced(
    budgets: Sequence[LayerBudget], kept: Mapping[int, tuple[int, ...]]
) -> dict[int, LayerPlan]:
    """Layers that keep the given ids, by index."""
    return {
        b.layer.index: LayerPlan(b.layer.index, b.layer.experts, b.top_k, kept[b.layer.index])
        for b in budgets
    }


def _folding(
    request: Request, evidence: Evidence, budget: LayerBudget, kept: tuple[int, ...], scores: Scores
) -> Folding:
    if evidence.weights is None:
        raise ValueError(f"method {request.method.name}: the weights were not prepared")
    index = budget.layer.index
    return Folding(
        budget=budget,
        kept=kept,
        scores=scores,
        statistics=evidence.statistics[0].layers[index] if evidence.statistics else None,
        weights=evidence.weights.layers[index],
        router=request.spec.router,
        keep_gate_rows=request.keep_gate_rows,
        options=request.options,
    )


def _super_experts(evidence: Evidence) -> dict[int, tuple[int, ...]]:
    """Those of any of the corpora."""
    found: dict[int, set[int]] = {}
    for statistics in evidence.statistics:
        for index, ids in statistics.super_experts().items():
            found.setdefault(index, set()).update(ids)
    return {index: tuple(sorted(ids)) for index, ids in found.items()}


def _scores(request: Request, evidence: Evidence, progress: Progress | None) -> dict[int, Scores]:
    method = request.method
    by_corpus = [statistics.layers for statistics in evidence.statistics]
    if method.from_statistics is not None and by_corpus:
        return {i: method.from_statistics(layer) for i, layer in by_corpus[0].items()}
    if method.from_corpora is not None and by_corpus:
        return {i: method.from_corpora([x[i] for x in by_corpus]) for i in by_corpus[0]}
    if method.from_seed is not None:
        generator = np.random.default_rng(request.seed)
        return {x.index: method.from_seed(x.experts, generator) for x in request.spec.layers}
    if method.from_weights is None or evidence.weights is None:
        raise ValueError(f"method {method.name}: what it scores from was not prepared")
    scores = {}
    layers = evidence.weights.layers
    for done, (index, layer) in enumerate(layers.items(), start=1):
        scores[index] = method.from_weights(layer)
        if progress is not None:
            progress(done, len(layers))
    return scores


def _protect(
    budgets: Sequence[LayerBudget],
    scores: Mapping[int, Scores],
    protected: Mapping[int, tuple[int, ...]],
    spec: ModelSpec,
) -> tuple[tuple[LayerBudget, ...], dict[int, Scores]]:
    """Rank protected experts above all others, and raise floors so that none can be pruned."""
    ranked = {index: values.copy() for index, values in scores.items()}
    raised = []
    for budget in budgets:
        ids = list(protected.get(budget.layer.index, ()))
        ranked[budget.layer.index][ids] = np.inf
        size = budget.layer.experts // spec.router.groups
        fullest = max(Counter(i // size for i in ids).values(), default=0)
        floor = max(budget.floor, spec.router.groups * fullest)
        raised.append(dataclasses.replace(budget, floor=floor))
    return tuple(raised), ranked


def _check_protected(
    budgets: Sequence[LayerBudget],
    counts: Mapping[int, int],
    protected: Mapping[int, tuple[int, ...]],
) -> None:
    for budget in budgets:
        index = budget.layer.index
        if counts[index] < budget.floor:
            raise PlanError(
                f"layer {index}: keeps {counts[index]} experts, expected at least {budget.floor} "
                f"to keep its super experts {list(protected[index])}"
            )


def _scores_to_json(
    scores: Mapping[int, Scores], protected: Mapping[int, tuple[int, ...]]
) -> dict[str, Any]:
    """Scores by layer, null where undefined: JSON has no infinities."""
    form: dict[str, Any] = {
        str(index): [float(x) if np.isfinite(x) else None for x in values]
        for index, values in scores.items()
    }
    if protected:
        form["super_experts"] = {str(index): list(ids) for index, ids in protected.items()}
    return form
