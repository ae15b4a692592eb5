"""The README.md of a pruned checkpoint: what it is, where it came from, how to run it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from liveprune.pruning.model_spec import MAPPINGS, ModelSpec
from liveprune.pruning.plan import LayerPlan, Plan

_LICENCE_KEYS = ("license", "license_name", "license_link")
_MAPPED = {
    "router_map": "`router_map` tensors: scores are the map times the softmax over those experts",
    "expert_map": "`expert_map` tensors: the expert here that does each one's work",
    "constants": "`expert_map` and `constants` tensors: those at -1 return a constant vector",
}
_FRONT_MATTER = re.compile(r"\s*---\n(.*?)\n---\s", re.DOTALL)


def model_card(model: Path, plan: Plan, spec: ModelSpec) -> str:
    """Return the card's text.

    Args:
        model: folder of the base model; its own card may state a licence, which is kept.
        plan: the plan carried out; it names the base model.
        spec: the pruned checkpoint's spec.
    """
    name = plan.base_model
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "base_model": name,
        "tags": ["pruning", "moe", "liveprune"],
        **_licence(model),
    }
    # JSON values are YAML values.
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in fields.items())
    experts = _span([layer.experts for layer in plan.layers])
    kept = _span([layer.kept_experts for layer in plan.layers])
    return f"""---
{front}
---

# {name}, {kept} of {experts} experts per layer

Made from `{name}` by Liveprune: a plan says which experts of
each layer stay or how they merge; shared experts, attention and embeddings are the base model's,
byte for byte.

## Run

{_usage(spec)}

## Lineage

| | |
|---|---|
{_lineage(plan)}

`liveprune/plan.json` in this folder is the whole plan: `liveprune inspect`, `liveprune apply`.

## Layers

| layer | experts before | experts | top-k | change |
|---|---|---|---|---|
{_rows(plan)}
"""


def _usage(spec: ModelSpec) -> str:
    if spec.is_uniform:
        return (
            "An ordinary checkpoint: `transformers`, `vllm serve` and `liveprune serve` load it "
            "without changes."
        )
    mappings = sorted({layer.mapping for layer in spec.layers if layer.mapping})
    if mappings:
        said = "; ".join(_MAPPED[mapping] for mapping in mappings)
        return (
            f"`liveprune serve PATH`. The gates of some layers keep a row for each expert of the "
            f"base model ({said}). They need Liveprune: stock `transformers` and vLLM cannot run "
            f"this checkpoint."
        )
    return (
        "`liveprune serve PATH`. The counts of each layer are in `per_layer_config`, the standard "
        "key of `transformers`; where stock model classes and stock vLLM cannot build layers of "
        "different counts, they refuse this checkpoint."
    )


def _lineage(plan: Plan) -> str:
    lineage = plan.lineage
    facts = {
        "plan": plan.digest,
        "method": lineage.method,
        "parameters": json.dumps(dict(lineage.parameters), default=str) or None,
        "seed": lineage.seed,
        "calibration digest": lineage.calibration,
        "versions": ", ".join(f"{k} {v}" for k, v in lineage.versions.items()) or None,
    }
    stated = {key: value for key, value in facts.items() if value is not None}
    return "\n".join(f"| {key} | `{_cell(value)}` |" for key, value in stated.items())


def _rows(plan: Plan) -> str:
    return "\n".join(
        f"| {x.layer} | {x.experts} | {x.kept_experts} | {x.top_k} | {_change(x)} |"
        for x in plan.layers
    )


def _change(layer: LayerPlan) -> str:
    if layer.is_identity:
        return "none"
    if layer.merges:
        change = "merged" if layer.neuron_map is None else "merged neuron by neuron"
        return f"{change}, with {MAPPINGS[layer.mapping]}" if layer.mapping else change
    kept = "kept " + ", ".join(map(str, layer.kept))
    return f"{kept}; the others constants" if layer.constants is not None else kept


def _licence(model: Path) -> dict[str, Any]:
    """The licence fields of the base model's card, if it has one that can be read."""
    import yaml

    try:
        front = _FRONT_MATTER.match((model / "README.md").read_text(encoding="utf-8"))
        metadata = yaml.safe_load(front[1]) if front else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(metadata, dict):
        return {}
    return {key: metadata[key] for key in _LICENCE_KEYS if metadata.get(key) is not None}


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
