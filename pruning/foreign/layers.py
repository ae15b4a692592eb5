"""What all readers of foreign plans share: a plan over a known model, and its top-k."""

from __future__ import annotations

from collections.abc import Sequence

from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import ModelSpec, MoELayer
from liveprune.pruning.plan import LayerPlan, Lineage, Plan


def plan_over(spec: ModelSpec, layers: Sequence[LayerPlan], lineage: Lineage) -> Plan:
    """A plan for the model that ``spec`` describes."""
    return Plan(
        architecture=spec.architecture.model_type,
        num_hidden_layers=spec.num_hidden_layers,
        layers=tuple(layers),
        lineage=lineage,
    )


def active_experts(base: MoELayer, kept: int, top_k: int | None) -> int:
    """Active experts of a layer in a form that does not state them.

    Without ``top_k`` the model's number holds. With it, a layer that keeps fewer experts
    activates all it keeps: top-k is lowered on request only (methods.md, section 1.3).

    Raises:
        PlanError: the layer keeps fewer experts than the model activates, and ``top_k`` is None.
    """
    if top_k is not None:
        return min(top_k, kept)
    if kept < base.top_k:
        raise PlanError(
            f"layer {base.index}: keeps {kept} experts, expected at least the model's top-k = "
            f"{base.top_k}; pass top_k to lower it"
        )
    return base.top_k
