"""Checks of a plan against a model, before anything long or costly starts.

The guards of methods.md section 1.3: each refusal names the layer, what was found and what was
expected.
"""

from __future__ import annotations

import numpy as np

from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import MAPPINGS, ModelSpec, MoELayer, Router
from liveprune.pruning.plan import LayerPlan, Plan


def check_plan(plan: Plan, spec: ModelSpec) -> None:
    """Refuse a plan that does not fit the model or could not be served.

    Raises:
        PlanError: naming the layer, the value found and the value expected.
    """
    if plan.architecture != spec.architecture.model_type:
        raise PlanError(
            f"plan: made for {plan.architecture!r}, the model is {spec.architecture.model_type!r}"
        )
    if plan.num_hidden_layers != spec.num_hidden_layers:
        raise PlanError(
            f"plan: made for {plan.num_hidden_layers} layers, the model has "
            f"{spec.num_hidden_layers}"
        )
    found = [layer.layer for layer in plan.layers]
    expected = [layer.index for layer in spec.layers]
    if found != expected:
        raise PlanError(f"plan: states the layers {found}, the model has experts in {expected}")
    for layer, base in zip(plan.layers, spec.layers, strict=True):
        _check_layer(layer, base, spec.router)
        _check_sizes(layer, spec)


def _check_layer(layer: LayerPlan, base: MoELayer, router: Router) -> None:
    where = f"layer {layer.layer}"
    if layer.experts != base.experts:
        raise PlanError(
            f"{where}: the plan is for {layer.experts} experts, the model has {base.experts}"
        )
    if base.mapping and not layer.is_identity:
        raise PlanError(
            f"{where}: this checkpoint already has {MAPPINGS[base.mapping]} ({base.router_width} "
            f"gate rows, {base.experts} experts); expected the base model it was made from"
        )
    if layer.top_k > base.top_k:
        raise PlanError(
            f"{where}: top_k is {layer.top_k}, expected at most the model's {base.top_k}"
        )
    if layer.router_map is not None and (router.scoring != "softmax" or router.groups > 1):
        raise PlanError(
            f"{where}: found a router map, expected none: it acts on softmax probabilities, and "
            f"this model routes by {router.scoring} in {router.groups} group(s)"
        )
    if layer.kept and not layer.keeps_gate_rows and not layer.is_identity and grouped(router):
        check_groups(layer.kept, layer.experts, layer.top_k, router, where)


def grouped(router: Router) -> bool:
    """A sliced gate must keep enough experts in every group."""
    return max(router.groups, router.group_top) > 1


def _check_sizes(layer: LayerPlan, spec: ModelSpec) -> None:
    """Arrays whose sizes are those of the model's vectors and matrices."""
    found = {"constants": layer.constants, "neuron_map": layer.neuron_map}
    expected = {"constants": spec.hidden_size, "neuron_map": spec.expert_size}
    for name, matrix in found.items():
        if matrix is not None and matrix.shape[1] != expected[name]:
            raise PlanError(
                f"layer {layer.layer}: {name} is {matrix.shape}, expected {expected[name]} "
                f"columns as in this model"
            )


def check_groups(
    kept: tuple[int, ...], experts: int, top_k: int, router: Router, where: str
) -> None:
    """Guards of group-limited routers (DeepSeek-V2/V3): an equal, sufficient number per group.

    Raises:
        PlanError: a group keeps another number than the rest, or too few.
    """
    size = experts // router.groups
    per_group = np.bincount(np.asarray(kept) // size, minlength=router.groups).tolist()
    if len(set(per_group)) != 1:
        raise PlanError(
            f"{where}: keeps {per_group} experts in its {router.groups} groups, expected the same "
            f"number in each (group-limited routing)"
        )
    if per_group[0] < router.group_top:
        raise PlanError(
            f"{where}: keeps {per_group[0]} expert(s) per group, expected at least "
            f"{router.group_top} (a group's score sums its best {router.group_top})"
        )
    reachable = router.top_groups * per_group[0]
    if reachable < top_k:
        raise PlanError(
            f"{where}: {router.top_groups} groups of {per_group[0]} reach {reachable} experts, "
            f"expected at least top_k = {top_k}"
        )
