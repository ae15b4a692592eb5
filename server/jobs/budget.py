"""The budget of a job: refused at once where it cannot be kept to, and put into a plan's terms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from liveprune.pruning.budget import layer_budgets, parse_budget
from liveprune.pruning.errors import PlanError
from liveprune.pruning.memory_target import budget_for, costs_of
from liveprune.pruning.methods import Method, find_method
from liveprune.pruning.methods.moeits_plan import check_options
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.search.budget_search import BudgetSettings
from liveprune.pruning.search.genome import make_space
from liveprune.pruning.search.presets import Settings, preset
from liveprune.server.budget_options import allowed_counts
from liveprune.server.jobs.request import ONE_PASS, SEARCH, JobRequest

GIVEN_ELSEWHERE = ("tau", "nmi")
"""Of ``moeits``: in ``settings``, though ``make_plan`` takes them by name."""
BUDGET_SETTINGS = frozenset(BudgetSettings.__dataclass_fields__)
"""Of ``evoesap``: in ``settings`` too."""


def search_settings(request: JobRequest) -> Settings:
    """Of ``eep``.

    Raises:
        PlanError: there is no such preset or parameter, or a value is out of range.
    """
    return preset(request.preset, **request.settings)


def budget_settings(request: JobRequest) -> BudgetSettings:
    """Of ``evoesap``.

    Raises:
        PlanError: a value is out of range.
    """
    return BudgetSettings(**{k: x for k, x in request.settings.items() if k in BUDGET_SETTINGS})


def method_options(request: JobRequest) -> tuple[Method, dict[str, object], dict[str, object]]:
    """A one-pass method, its own parameters, and those that ``make_plan`` takes by name.

    Raises:
        PlanError: there is no such method or parameter, or a value is out of range.
    """
    try:
        method = find_method(request.method)
    except PlanError as error:
        raise PlanError(f"{error}; or {SEARCH}, which searches") from error
    named = {
        name: value
        for name, value in request.settings.items()
        if name in GIVEN_ELSEWHERE and method.from_pairs is not None
    }
    elsewhere = named.keys() | (BUDGET_SETTINGS if request.searches_budgets else frozenset())
    own = {name: value for name, value in request.settings.items() if name not in elsewhere}
    method.with_options(own)
    return method, own, named


def plan_arguments(request: JobRequest, spec: ModelSpec) -> dict[str, Any]:
    """What ``make_plan`` is told of the budget, but for a search's allocator."""
    return {
        "experts": request.experts,
        "target_memory": request.target_memory,
        "top_k": request.top_k,
        "allocate": None if request.searches_budgets else request.allocate,
        "min_experts": request.min_experts,
        "max_experts": request.max_experts,
        "allowed_counts": allowed_counts(spec, request.snap, request.expert_parallel),
        "keep_gate_rows": None if request.router is None else request.router == "keep",
        "skip_layers": request.skip_layers,
        "keep_super_experts": request.keep_super_experts,
    }


def check_budget(request: JobRequest, model: Path, spec: ModelSpec) -> None:
    """Refuse a budget or parameters that do not fit each other, the method or the model.

    Raises:
        PlanError: they do not.
    """
    if request.searches:
        _check_search(request, spec)
        return
    method, _, named = method_options(request)
    if request.searches_budgets:
        budget_settings(request)
        if method.choose is not None:
            raise PlanError(
                f"allocate: found evoesap with method {method.name}, which shares experts out "
                f"itself, expected a method that ranks them"
            )
    if request.router is not None and method.keep_gate_rows is None:
        raise PlanError(f"router: found with method {method.name}, expected one that merges")
    how = request.allocate or method.allocate
    comparing = "uniform" if request.searches_budgets else how
    how = "global" if request.searches_budgets else how
    asked = request.experts if request.target_memory is None else request.target_memory
    tau = named.get("tau")
    if tau is not None and not (isinstance(tau, int | float) and math.isfinite(tau)):
        raise PlanError(f"tau is {tau!r}, expected a number")
    check_options(method, asked, tau, str(named.get("nmi", "plain")), comparing, spec.router)
    given = plan_arguments(request, spec)
    budget = parse_budget(1.0 if request.experts is None else request.experts)
    if request.target_memory is not None:
        whole = layer_budgets(spec, budget, top_k=request.top_k, skip_layers=request.skip_layers)
        budget = budget_for(
            costs_of(
                model,
                spec,
                keep_gate_rows=bool(given["keep_gate_rows"]),
                constants=method.leaves_constants,
            ),
            spec,
            request.target_memory,
            floors={item.layer.index: item.floor for item in whole},
            skip_layers=request.skip_layers,
            allocate=how,
        )
    layer_budgets(
        spec,
        budget,
        top_k=request.top_k,
        skip_layers=request.skip_layers,
        allocate=how,
        least=request.min_experts,
        most=request.max_experts,
        allowed=given["allowed_counts"],
    )


def _check_search(request: JobRequest, spec: ModelSpec) -> None:
    given = request.model_dump(exclude_defaults=True)
    foreign = [name for name in ONE_PASS if name in given]
    if foreign:
        raise PlanError(f"{foreign[0]}: found with method {SEARCH}, which does not have it")
    if isinstance(request.top_k, list):
        raise PlanError(f"top_k: found a list, expected one number for method {SEARCH}")
    experts = request.experts if request.experts is not None else 1.0  # refused: nothing is pruned
    make_space(spec, search_settings(request), experts=experts, top_k=request.top_k)
