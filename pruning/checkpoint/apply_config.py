"""The config of a pruned checkpoint: counts where stock software reads them, the rest in one block.

Uniform plans change the scalars only. Others use transformers' ``per_layer_config`` with canonical
keys: with an alias, stock vLLM would build uniform layers (conventions.md, section 7).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from liveprune.pruning.checkpoint.layer_tensors import mtp_experts
from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import BLOCK_KEY, BLOCK_VERSION, LIST_KEYS, ModelSpec
from liveprune.pruning.plan import Plan

PER_LAYER_KEY = "per_layer_config"
QUANTISATION_KEY = "quantization_config"
_EXPERT_ID = re.compile(r"experts[\\.]+\d")
"""An expert named by its id, also inside a regular expression."""


def apply_config(
    config: Mapping[str, Any],
    plan: Plan,
    spec: ModelSpec,
    *,
    fingerprints: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """Return ``config`` as it reads after ``plan``; only counts and our block change.

    Args:
        config: the base model's config.json.
        plan: a plan that passed ``check_plan`` against ``spec``.
        spec: ``ModelSpec.from_config(config)``.
        fingerprints: of the new layers, by index, when they are known.

    Raises:
        PlanError: the quantisation names experts in a way that cannot follow the plan.
    """
    result = copy.deepcopy(dict(config))
    architecture = spec.architecture
    keys = [key for key in _count_keys(spec) if result.get(key) is not None]
    experts = max(layer.kept_experts for layer in plan.layers)
    top_k = max(layer.top_k for layer in plan.layers)
    for key in keys or [architecture.count_key]:
        result[key] = experts
    result[architecture.top_k_key] = top_k
    for key in LIST_KEYS:
        result.pop(key, None)
    overrides = _overrides(result.pop(PER_LAYER_KEY, None) or {}, plan, spec, experts, top_k)
    if overrides:
        result[PER_LAYER_KEY] = overrides
    if QUANTISATION_KEY in result:
        result[QUANTISATION_KEY] = _follow(result[QUANTISATION_KEY], plan, spec)
    result[BLOCK_KEY] = _block(plan, spec, fingerprints)
    return result


def _count_keys(spec: ModelSpec) -> tuple[str, ...]:
    return (spec.architecture.count_key, *spec.architecture.count_aliases)


def _overrides(
    before: Mapping[str, Mapping[str, Any]], plan: Plan, spec: ModelSpec, experts: int, top_k: int
) -> dict[str, dict[str, Any]]:
    """``per_layer_config``: what differs from the scalars, and overrides of other fields."""
    ours = {*_count_keys(spec), spec.architecture.top_k_key}
    after = {int(i): {k: v for k, v in x.items() if k not in ours} for i, x in before.items()}
    for layer in plan.layers:
        override = after.setdefault(layer.layer, {})
        if layer.kept_experts != experts:
            override[spec.architecture.count_key] = layer.kept_experts
        if layer.top_k != top_k:
            override[spec.architecture.top_k_key] = layer.top_k
    return {str(index): after[index] for index in sorted(after) if after[index]}


def _block(plan: Plan, spec: ModelSpec, fingerprints: Mapping[int, str] | None) -> dict[str, Any]:
    """What standard keys cannot say."""
    widths, mappings = {}, {}
    for layer, base in zip(plan.layers, spec.layers, strict=True):
        mapping = layer.mapping or base.mapping
        if mapping:
            widths[str(layer.layer)] = base.router_width
            mappings[str(layer.layer)] = mapping
    block: dict[str, Any] = {
        "version": BLOCK_VERSION,
        "plan": plan.digest,
        "base_model": plan.base_model,
        "base_experts": {str(layer.layer): layer.experts for layer in plan.layers},
    }
    if widths:
        block["router_width"] = widths
        block["router_mapping"] = mappings
    if fingerprints is not None:
        block["fingerprints"] = {str(index): value for index, value in fingerprints.items()}
    if spec.mtp_layers:
        block["mtp_experts"] = mtp_experts(spec)
    return block


def _follow(value: Any, plan: Plan, spec: ModelSpec) -> Any:
    """Rename the experts that a quantisation config names, and drop those that are gone.

    Ignore lists and per-module tables hold module names, as list items or as keys.
    """
    if isinstance(value, Mapping):
        renamed = ((_renamed(key, plan, spec), item) for key, item in value.items())
        return {key: _follow(item, plan, spec) for key, item in renamed if key is not None}
    if isinstance(value, list):
        followed = (_follow(item, plan, spec) for item in value)
        return [item for item in followed if item is not None]
    return _renamed(value, plan, spec) if isinstance(value, str) else value


def _renamed(name: str, plan: Plan, spec: ModelSpec) -> str | None:
    """The module's name after the plan; None when the plan removes it."""
    changed = {layer.layer: layer for layer in plan.layers if not layer.is_identity}
    if not changed or not _EXPERT_ID.search(name):
        return name
    block = re.escape(spec.architecture.block)
    match = re.fullmatch(rf"(model\.layers\.(\d+)\.{block}\.experts\.)(\d+)(|\..+)", name)
    if match is None:
        raise PlanError(
            f"config.json: {QUANTISATION_KEY} names {name!r}; expected the full name of a module, "
            f"since the plan gives experts new numbers"
        )
    prefix, index, expert, rest = match.groups()
    layer = changed.get(int(index))
    if layer is None:
        return name
    if layer.merges:
        raise PlanError(
            f"config.json: {QUANTISATION_KEY} names {name!r}; expected no single experts of "
            f"layer {index}, which the plan merges"
        )
    if int(expert) not in layer.kept:
        return None
    return f"{prefix}{layer.kept.index(int(expert))}{rest}"
