"""From a model, a method and a budget to a plan."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from liveprune.pruning.budget import (
    LayerBudget,
    allocate_global,
    global_total,
    layer_budgets,
    parse_budget,
    select,
)
from liveprune.pruning.calibration.rows import MAX_ROWS, MAX_TOKENS, Rows, load_rows
from liveprune.pruning.calibration.statistics import RoutingStatistics
from liveprune.pruning.calibration.weights import Weights
from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.errors import DataError, PlanError
from liveprune.pruning.methods import Method, find_method
from liveprune.pruning.methods.moeits_plan import (
    check_options,
    compare_experts,
    counts_by_tau,
    least,
    ranks,
    removals_to_json,
)
from liveprune.pruning.model_name import model_name
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_guards import check_plan

if TYPE_CHECKING:
    from liveprune.pruning.methods.method import Scores

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def make_plan(
    model: Path,
    *,
    method: str,
    experts: str | float | Sequence[int] | None = None,
    tau: float | None = None,
    nmi: str = "plain",
    top_k: int | Sequence[int] | None = None,
    calibration: Path | None = None,
    seed: int = 0,
    allocate: str = "uniform",
    skip_layers: Collection[int] = (),
    keep_super_experts: bool = False,
    max_tokens: int = MAX_TOKENS,
    max_rows: int = MAX_ROWS,
    device: str = "cpu",
    statistics_cache: Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Make the plan that ``method`` gives for ``model`` under a budget, or at ``tau``.

    Args:
        model: Checkpoint folder.
        method: A name from ``METHODS``.
        experts: Budget, see ``budget``: a count, a fraction kept, or a list per layer. Required,
            but for ``moeits`` with ``tau``.
        tau: For ``moeits`` in place of ``experts``: each layer keeps what the threshold
            mean + tau * IQR leaves, at least what it can be served with.
        nmi: For ``moeits``: ``plain``, or a control: ``shuffled``, ``corrected`` (see ``nmi``).
        top_k: Active experts; None keeps the model's.
        calibration: JSONL rows (see ``calibration.rows``); read only if the method, or
            ``keep_super_experts``, needs them.
        seed: For methods and estimators that draw.
        allocate: ``uniform``, or ``global`` to share one total out over the layers.
        skip_layers: Indices of layers left as they are.
        keep_super_experts: Never prune experts with outlying activations (methods.md, 5.5).
        max_tokens: Tokens used of each row.
        max_rows: Rows used, from the top of the file.
        device: Where the observer pass runs: ``cpu`` or a CUDA device.
        statistics_cache: Folder in which the observer pass's result is kept, by model and rows,
            and found again by every method.
        progress: Called with (done, total) steps of the pass.

    Raises:
        PlanError: unknown method, or a budget that does not fit or could not be served.
        DataError: calibration rows are missing or unusable.
        CheckpointError: the weights are missing, damaged or quantised.
        ArchitectureError: the model is not supported.
    """
    chosen = find_method(method)
    spec = ModelSpec.from_path(model)
    check_options(chosen, experts, tau, nmi, allocate, spec.router)
    budget = parse_budget(1.0 if experts is None else experts)
    budgets = layer_budgets(spec, budget, top_k=top_k, skip_layers=skip_layers, allocate=allocate)
    _check_before_pass(budgets if tau is None else least(budgets), spec)
    needs_rows = chosen.needs_calibration or keep_super_experts
    if needs_rows:
        _check_device(device)
    if statistics_cache is not None and statistics_cache.exists() and not statistics_cache.is_dir():
        raise DataError(f"statistics cache {statistics_cache}: found a file, expected a folder")
    weights = Weights(model, spec) if needs_rows or chosen.reads_weights else None
    rows = _rows(model, spec, chosen, calibration, max_tokens, max_rows) if needs_rows else None
    statistics = None
    if rows is not None and weights is not None:
        statistics = _statistics(model, rows, device, statistics_cache, progress)
    removals = {}
    if chosen.from_pairs is not None and weights is not None:
        removals = compare_experts(chosen, weights, budgets, nmi, seed, progress)
        scores = ranks(removals, budgets)
    else:
        scores = _scores(chosen, spec, statistics, weights, seed, progress)
    protected = statistics.super_experts() if statistics and keep_super_experts else {}
    budgets, ranked = _protect(budgets, scores, protected, spec)
    counts = {item.layer.index: item.keep for item in budgets}
    if allocate == "global":
        total = global_total(budgets, budget, spec.router)
        counts = allocate_global(budgets, ranked, total, spec.router)
    if tau is not None:
        counts = counts_by_tau(removals, tau, budgets, protected)
    _check_protected(budgets, counts, protected)
    lineage = Lineage(
        method=chosen.name,
        parameters={
            "experts": experts if isinstance(experts, str | int | float | None) else list(experts),
            "top_k": top_k if top_k is None or isinstance(top_k, int) else list(top_k),
            "allocate": allocate,
            "skip_layers": sorted(skip_layers),
            "keep_super_experts": keep_super_experts,
            **({"max_tokens": max_tokens, "max_rows": max_rows} if rows else {}),
            **({"tau": tau, "nmi": nmi} if chosen.from_pairs is not None else {}),
        },
        seed=seed if chosen.from_seed is not None or nmi != "plain" else None,
        calibration=rows.digest if rows else None,
        versions=installed_versions(),
        scores={
            **_scores_to_json(scores, protected),
            **({"removals": removals_to_json(removals, tau, counts)} if removals else {}),
        },
    )
    kept = {i: select(ranked[i], count, spec.router, i) for i, count in counts.items()}
    plan = _plan(spec, budgets, kept, lineage, model_name(model))
    check_plan(plan, spec)
    return plan


def _check_device(device: str) -> None:
    import torch

    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in (*available, *(["cuda"] if len(available) > 1 else [])):
        raise DataError(f"device: found {device!r}, expected one of {', '.join(available)}")


def _check_before_pass(budgets: Sequence[LayerBudget], spec: ModelSpec) -> None:
    """Put a stand-in for the plan through the guards: same counts and top-k, arbitrary ids."""
    blank = {b.layer.index: np.zeros(b.layer.experts) for b in budgets}
    kept = {
        b.layer.index: select(blank[b.layer.index], max(b.keep, b.floor), spec.router, 0)
        for b in budgets
    }
    check_plan(_plan(spec, budgets, kept, Lineage("none"), ""), spec)


def _rows(
    model: Path,
    spec: ModelSpec,
    method: Method,
    calibration: Path | None,
    max_tokens: int,
    max_rows: int,
) -> Rows:
    if calibration is None:
        asker = f"method {method.name}" if method.needs_calibration else "keep_super_experts"
        raise DataError(f"{asker} needs calibration rows: found none, expected a JSONL file")
    vocab_size = int(spec.config.get("vocab_size") or sys.maxsize)
    return load_rows(
        calibration, model, vocab_size=vocab_size, max_tokens=max_tokens, max_rows=max_rows
    )


def _statistics(
    model: Path, rows: Rows, device: str, cache: Path | None, progress: Progress | None
) -> RoutingStatistics:
    """Run the observer pass, or find its result in the cache."""
    from liveprune.pruning.calibration.observer import observe

    if cache is None:
        return observe(model, rows, device=device, progress=progress)
    key = f"{fingerprint_model(model)}{rows.digest}"
    path = cache / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"
    if path.exists():
        return RoutingStatistics.load(path)
    statistics = observe(model, rows, device=device, progress=progress)
    statistics.save(path)
    return statistics


def _scores(
    method: Method,
    spec: ModelSpec,
    statistics: RoutingStatistics | None,
    weights: Weights | None,
    seed: int,
    progress: Progress | None,
) -> dict[int, Scores]:
    if method.from_statistics is not None and statistics is not None:
        return {i: method.from_statistics(layer) for i, layer in statistics.layers.items()}
    if method.from_seed is not None:
        generator = np.random.default_rng(seed)
        return {x.index: method.from_seed(x.experts, generator) for x in spec.layers}
    if method.from_weights is None or weights is None:
        raise ValueError(f"method {method.name}: what it scores from was not prepared")
    scores = {}
    for done, (index, layer) in enumerate(weights.layers.items(), start=1):
        scores[index] = method.from_weights(layer)
        if progress is not None:
            progress(done, len(weights.layers))
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


def _plan(
    spec: ModelSpec,
    budgets: Sequence[LayerBudget],
    kept: Mapping[int, tuple[int, ...]],
    lineage: Lineage,
    base_model: str,
) -> Plan:
    return Plan(
        architecture=spec.architecture.model_type,
        num_hidden_layers=spec.num_hidden_layers,
        layers=tuple(
            LayerPlan(b.layer.index, b.layer.experts, b.top_k, kept[b.layer.index]) for b in budgets
        ),
        lineage=lineage,
        base_model=base_model,
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


def installed_versions() -> dict[str, str]:
    """Versions of what a plan's numbers hang on."""
    found = {}
    for name in ("liveprune", "torch", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
