"""From a model, a method and a budget to a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from liveprune.pruning.allocation import global_total, select
from liveprune.pruning.budget import Budget, LayerBudget, layer_budgets, parse_budget
from liveprune.pruning.calibration.rows import MAX_ROWS, MAX_TOKENS
from liveprune.pruning.errors import PlanError
from liveprune.pruning.evidence import Calibration, Evidence, as_files, gather
from liveprune.pruning.memory_target import budget_for, costs_of
from liveprune.pruning.methods import Method, find_method
from liveprune.pruning.methods.method import Choosing, Chosen
from liveprune.pruning.methods.moeits_plan import check_options, least
from liveprune.pruning.model_name import model_name
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_guards import check_plan
from liveprune.pruning.ranking import Allocator, Progress, Request, by_ranking, sliced


def make_plan(
    model: Path,
    *,
    method: str,
    experts: str | float | Sequence[int] | None = None,
    target_memory: int | None = None,
    tau: float | None = None,
    nmi: str = "plain",
    top_k: int | Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    keep_gate_rows: bool | None = None,
    calibration: Path | Sequence[Path] | None = None,
    seed: int = 0,
    allocate: str | Allocator | None = None,
    min_experts: int | None = None,
    max_experts: int | None = None,
    allowed_counts: Collection[int] | None = None,
    skip_layers: Collection[int] = (),
    keep_super_experts: bool = False,
    max_tokens: int = MAX_TOKENS,
    max_rows: int = MAX_ROWS,
    device: str = "cpu",
    statistics_cache: Path | None = None,
    statistics: Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Make the plan that ``method`` gives for ``model`` under a budget, or at ``tau``.

    Args:
        model: Checkpoint folder.
        method: A name from ``METHODS``.
        experts: Budget, see ``budget``: a count, a fraction kept, or a list per layer. Required,
            but for ``moeits`` with ``tau``.
        target_memory: In place of ``experts``: bytes that the weights of the pruned checkpoint may
            take at most, see ``memory_target``.
        tau: For ``moeits`` in place of ``experts``: each layer keeps what the threshold
            mean + tau * IQR leaves, at least what it can be served with.
        nmi: For ``moeits``: ``plain``, or a control: ``shuffled``, ``corrected`` (see ``nmi``).
        top_k: Active experts; None keeps the model's.
        options: The method's own parameters, see ``Method.options``.
        keep_gate_rows: For methods that merge: route over the old experts and map the choice,
            or slice the gate; None takes the method's own way.
        calibration: JSONL rows (see ``calibration.rows``), of one file or several; read only if
            the method, or ``keep_super_experts``, needs them.
        seed: For methods and estimators that draw.
        allocate: ``uniform``, or ``global`` to share one total out over the layers by score, or
            who else shares it out; None takes the method's own way.
        min_experts: Fewest experts that ``global`` leaves a layer.
        max_experts: Most experts that it leaves a layer.
        allowed_counts: Counts that a pruned layer may have; each keeps the next lower one than its
            budget says. Never more than the budget in all, and less where counts are snapped.
        skip_layers: Indices of layers left as they are.
        keep_super_experts: Never prune experts with outlying activations (methods.md, 5.5).
        max_tokens: Tokens used of each row.
        max_rows: Rows used of each file, from its top.
        device: Where the observer pass runs: ``cpu`` or a CUDA device.
        statistics_cache: Folder in which the observer pass's result is kept, by model and rows,
            and found again by every method.
        statistics: In place of ``calibration``: a file of statistics, e.g. of live traffic; methods
            that need more than it holds are refused.
        progress: Called with (done, total) steps of the pass.

    Raises:
        PlanError: unknown method, or a budget that does not fit or could not be served.
        DataError: calibration rows are missing or unusable.
        CheckpointError: the weights are missing, damaged or quantised.
        ArchitectureError: the model is not supported.
    """
    chosen = find_method(method)
    spec = ModelSpec.from_path(model)
    own = chosen.with_options(options or {})
    if keep_gate_rows is not None and chosen.keep_gate_rows is None:
        raise PlanError(f"method {chosen.name}: found a choice of gate rows, expected none")
    rows_kept = bool(chosen.keep_gate_rows) if keep_gate_rows is None else keep_gate_rows
    if experts is not None and target_memory is not None:
        raise PlanError("found both experts and target_memory, expected one of them")
    budget = parse_budget(1.0 if experts is None else experts)
    allocator = None if isinstance(allocate, str | None) else allocate
    if allocator is not None and chosen.choose is not None:
        raise PlanError(f"method {chosen.name}: it shares experts out itself, expected a ranking")
    stated = allocate if isinstance(allocate, str) else None
    # A count for each layer leaves nothing to share out.
    own_way = chosen.allocate if budget.counts is None and budget.ranges is None else "uniform"
    how = "global" if allocator is not None else stated or own_way
    # An allocator needs each layer's ranking only, so scores need not compare across layers.
    comparing = "uniform" if allocator is not None else how
    asked = experts if target_memory is None else target_memory
    check_options(chosen, asked, tau, nmi, comparing, spec.router)
    if target_memory is not None:
        budget = _within(model, spec, chosen, target_memory, rows_kept, top_k, skip_layers, how)
    budgets = layer_budgets(
        spec,
        budget,
        top_k=top_k,
        skip_layers=skip_layers,
        allocate=how,
        least=min_experts,
        most=max_experts,
        allowed=allowed_counts,
    )
    total = global_total(budgets, budget, spec.router) if how == "global" else None
    if total is not None and allowed_counts is not None and chosen.choose is not None:
        raise PlanError(f"method {chosen.name}: found allowed counts, expected them with 'uniform'")
    _check_before_pass(budgets if tau is None else least(budgets), spec)
    evidence = gather(
        model,
        spec,
        chosen,
        Calibration(
            as_files(calibration), max_tokens, max_rows, device, statistics_cache, statistics
        ),
        statistics=keep_super_experts,
        progress=progress,
    )
    request = Request(
        method=chosen,
        spec=spec,
        budgets=budgets,
        total=total,
        allocator=allocator,
        allowed_counts=allowed_counts,
        options=own,
        keep_gate_rows=rows_kept,
        keep_super_experts=keep_super_experts,
        tau=tau,
        nmi=nmi,
        seed=seed,
    )
    if chosen.choose is None:
        layers, scores = by_ranking(request, evidence, progress)
    else:
        layers, scores = _by_choice(chosen.choose, request, evidence, model, device, progress)
    lineage = Lineage(
        method=chosen.name,
        parameters={
            "experts": experts if isinstance(experts, str | int | float | None) else list(experts),
            **({} if target_memory is None else {"target_memory": target_memory}),
            **_limits(min_experts, max_experts, allowed_counts),
            "top_k": top_k if top_k is None or isinstance(top_k, int) else list(top_k),
            "allocate": how if allocator is None else allocator.name,
            "skip_layers": sorted(skip_layers),
            "keep_super_experts": keep_super_experts,
            **({"max_tokens": max_tokens, "max_rows": max_rows} if evidence.corpora else {}),
            **({"tau": tau, "nmi": nmi} if chosen.from_pairs is not None else {}),
            **({"keep_gate_rows": rows_kept} if chosen.keep_gate_rows is not None else {}),
            **own,
        },
        seed=seed if chosen.draws or nmi != "plain" else None,
        calibration=evidence.digest,
        versions=installed_versions(),
        scores=scores,
    )
    plan = _plan(spec, layers, lineage, model_name(model))
    check_plan(plan, spec)
    return plan


def _by_choice(
    choose: Callable[[Choosing], Chosen],
    request: Request,
    evidence: Evidence,
    model: Path,
    device: str,
    progress: Progress | None,
) -> tuple[dict[int, LayerPlan], dict[str, Any]]:
    """Layers and lineage scores of a method that chooses whole layers."""
    if evidence.weights is None:
        raise ValueError(f"method {request.method.name}: the weights were not prepared")
    if request.keep_super_experts:
        raise PlanError(f"method {request.method.name}: found keep_super_experts, expected none")
    found = choose(
        Choosing(
            model=model,
            spec=request.spec,
            budgets=request.budgets,
            total=request.total,
            rows=evidence.corpora[0] if evidence.corpora else None,
            statistics=evidence.statistics[0] if evidence.statistics else None,
            weights=evidence.weights,
            device=device,
            seed=request.seed,
            keep_gate_rows=request.keep_gate_rows,
            options=request.options,
            progress=progress,
        )
    )
    whole = {b.layer.index: tuple(range(b.layer.experts)) for b in request.budgets}
    return {**sliced(request.budgets, whole), **found.layers}, dict(found.scores)


def _limits(least: int | None, most: int | None, allowed: Collection[int] | None) -> dict[str, Any]:
    """Those that were stated, for the lineage."""
    named = {"min_experts": least, "max_experts": most}
    named["allowed_counts"] = None if allowed is None else sorted(allowed)  # type: ignore[assignment]
    return {name: value for name, value in named.items() if value is not None}


def _within(
    model: Path,
    spec: ModelSpec,
    method: Method,
    target: int,
    keep_gate_rows: bool,
    top_k: int | Sequence[int] | None,
    skip_layers: Collection[int],
    allocate: str,
) -> Budget:
    """The budget that ``target`` bytes of weights allow."""
    whole = layer_budgets(spec, parse_budget(1.0), top_k=top_k, skip_layers=skip_layers)
    costs = costs_of(model, spec, keep_gate_rows=keep_gate_rows, constants=method.leaves_constants)
    return budget_for(
        costs,
        spec,
        target,
        floors={item.layer.index: item.floor for item in whole},
        skip_layers=skip_layers,
        allocate=allocate,
    )


def _check_before_pass(budgets: Sequence[LayerBudget], spec: ModelSpec) -> None:
    """Put a stand-in for the plan through the guards: same counts and top-k, arbitrary ids."""
    blank = {b.layer.index: np.zeros(b.layer.experts) for b in budgets}
    kept = {
        b.layer.index: select(blank[b.layer.index], max(b.keep, b.floor), spec.router, 0)
        for b in budgets
    }
    check_plan(_plan(spec, sliced(budgets, kept), Lineage("none"), ""), spec)


def _plan(
    spec: ModelSpec, layers: Mapping[int, LayerPlan], lineage: Lineage, base_model: str
) -> Plan:
    return Plan(
        architecture=spec.architecture.model_type,
        num_hidden_layers=spec.num_hidden_layers,
        layers=tuple(layers[index] for index in sorted(layers)),
        lineage=lineage,
        base_model=base_model,
    )


def installed_versions() -> dict[str, str]:
    """Versions of what a plan's numbers hang on."""
    found = {}
    for name in ("liveprune", "torch", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
