"""What a model folder or a plan file holds, per layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from liveprune.pruning.checkpoint.layer_tensors import layer_tensors
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint
from liveprune.pruning.foreign import read_any_plan
from liveprune.pruning.model_spec import ModelSpec, Router, read_block


@dataclass(frozen=True)
class LayerInspection:
    """One layer with experts."""

    layer: int
    experts: int
    """Experts of the base model."""
    kept: int
    """Experts of this checkpoint or plan."""
    top_k: int
    bytes: int | None
    """Stored bytes of the layer's routed experts; None for a plan, which holds no weights."""
    mapping: str
    """``router_map``, ``expert_map`` or ``constants`` where the gate keeps the rows of the base
    model, else ""."""


@dataclass(frozen=True)
class Inspection:
    """A model or a plan at a glance."""

    kind: str
    """``model`` or ``plan``."""
    architecture: str
    num_hidden_layers: int
    layers: tuple[LayerInspection, ...]
    digest: str | None
    """The plan's content digest; None for a base model."""
    base_model: str | None
    router: str | None
    """E.g. ``softmax, renormalised``; None for a plan."""
    router_maps: int
    """Layers whose scores pass through a router map."""
    quantisation: str | None
    """Method named by the config; None for plain weights and for plans."""
    total_bytes: int | None
    """All tensors of the checkpoint; None for a plan."""

    @property
    def expert_bytes(self) -> int | None:
        """Stored bytes of all routed experts; None for a plan."""
        sizes = [layer.bytes for layer in self.layers if layer.bytes is not None]
        return sum(sizes) if sizes else None

    def to_json(self) -> dict[str, Any]:
        """``{"layers": [{"layer", "experts", "kept", "top_k", "bytes", "mapping"}], ...}``."""
        form = asdict(self)
        form["layers"] = [asdict(layer) for layer in self.layers]
        form["totals"] = {
            "experts": sum(layer.experts for layer in self.layers),
            "kept": sum(layer.kept for layer in self.layers),
            "expert_bytes": self.expert_bytes,
        }
        return form


def inspect(path: Path, spec: ModelSpec | None = None) -> Inspection:
    """Inspect a model folder (headers only) or a plan file, Liveprune's own or a foreign one.

    Args:
        path: a folder with config.json, or a plan.
        spec: the base model, for foreign plans that do not state theirs.

    Raises:
        CheckpointError: the folder's files are damaged or contradict its config.
        ArchitectureError: the family is not supported.
        PlanError: the file is no plan, or it is a foreign one and needs ``spec``.
    """
    if (path / "config.json").is_file():
        return _inspect_model(path)
    plan = read_any_plan(path, spec)
    return Inspection(
        kind="plan",
        architecture=plan.architecture,
        num_hidden_layers=plan.num_hidden_layers,
        layers=tuple(
            LayerInspection(x.layer, x.experts, x.kept_experts, x.top_k, None, x.mapping)
            for x in plan.layers
        ),
        digest=plan.digest,
        base_model=plan.base_model or None,
        router=None,
        router_maps=sum(layer.router_map is not None for layer in plan.layers),
        quantisation=None,
        total_bytes=None,
    )


def _inspect_model(path: Path) -> Inspection:
    spec = ModelSpec.from_path(path)
    checkpoint = read_checkpoint(path)
    block = read_block(spec.config) or {}
    before = {int(index): int(count) for index, count in block.get("base_experts", {}).items()}
    layers = [
        LayerInspection(
            layer=x.layer.index,
            experts=before.get(x.layer.index, x.layer.experts),
            kept=x.layer.experts,
            top_k=x.layer.top_k,
            bytes=x.expert_bytes,
            mapping=x.layer.mapping,
        )
        for x in layer_tensors(checkpoint.tensors, spec)
    ]
    return Inspection(
        kind="model",
        architecture=spec.architecture.model_type,
        num_hidden_layers=spec.num_hidden_layers,
        layers=tuple(layers),
        digest=block.get("plan"),
        base_model=block.get("base_model") or None,
        router=_router(spec.router),
        router_maps=sum(layer.has_router_map for layer in spec.layers),
        quantisation=_quantisation(spec.config),
        total_bytes=checkpoint.size,
    )


def _router(router: Router) -> str:
    parts = [router.scoring, "renormalised" if router.renormalise else "not renormalised"]
    if router.groups > 1:
        parts.append(f"{router.top_groups} of {router.groups} groups")
    return ", ".join(parts)


def _quantisation(config: Mapping[str, Any]) -> str | None:
    stated = config.get("quantization_config")
    if not isinstance(stated, Mapping):
        return None
    return str(stated.get("quant_method") or json.dumps(stated))
