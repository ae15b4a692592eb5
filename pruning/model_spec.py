"""What a checkpoint's ``config.json`` says about its experts, parsed once.

Reads uniform configs, transformers' ``per_layer_config`` (canonical and alias keys alike), the
list-valued keys seen in the wild, and Liveprune's own ``liveprune`` block.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from liveprune.pruning.architectures import Architecture, architecture_of
from liveprune.pruning.errors import ArchitectureError, CheckpointError

BLOCK_KEY = "liveprune"
BLOCK_VERSION = 1
LIST_KEYS = ("num_experts_per_layer", "num_experts_by_block", "n_routed_experts_per_layer")
"""Per-layer counts as written by EvoESAP, MoEITS and others (conventions.md, section 3.1)."""

MAPPINGS = {
    "router_map": "a router map",
    "expert_map": "an expert map",
    "constants": "constant experts",
}
"""How the choice of a gate that keeps the base model's rows is mapped (``LayerPlan.mapping``),
in words."""


@dataclass(frozen=True)
class Router:
    """How a layer turns gate logits into expert ids and weights."""

    scoring: str
    """``softmax`` or ``sigmoid``."""
    renormalise: bool
    """Top-k weights are divided by their sum."""
    groups: int = 1
    """Experts are split into this many equal groups; 1 means no group limit."""
    top_groups: int = 1
    """Groups that may be selected for one token."""
    group_top: int = 1
    """Best experts of a group whose scores are summed into the group's score."""
    scale: float = 1.0
    """Factor on the routed weights."""


@dataclass(frozen=True)
class MoELayer:
    """The counts of one layer that has experts."""

    index: int
    experts: int
    """Expert rows stored in the checkpoint."""
    top_k: int
    """Choices per token, at most ``candidates``."""
    router_width: int
    """Rows of the gate; other than ``experts`` only under a mapping."""
    mapping: str = ""
    """One of ``MAPPINGS``, or "": the gate has a row per expert. The widths alone do not tell: a
    router map may be square (EEP without pruning, methods.md section 2.1)."""

    @property
    def has_router_map(self) -> bool:
        """The layer holds a router map [experts, router_width]."""
        return self.mapping == "router_map"

    @property
    def candidates(self) -> int:
        """What the router takes its top-k of: experts, or rows of a gate that keeps the base's."""
        return self.router_width if self.mapping in ("expert_map", "constants") else self.experts


@dataclass(frozen=True)
class ModelSpec:
    """Everything Liveprune reads from one ``config.json``."""

    architecture: Architecture
    layers: tuple[MoELayer, ...]
    router: Router
    num_hidden_layers: int
    hidden_size: int
    expert_size: int
    mtp_layers: int
    config: Mapping[str, Any]

    @classmethod
    def from_path(cls, model: Path) -> ModelSpec:
        """Read ``model/config.json``.

        Raises:
            CheckpointError: there is no readable config.
            ArchitectureError: the family or one of its features is not supported.
        """
        path = model / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: not found; expected a checkpoint folder") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: found {type(config).__name__}, expected an object")
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Parse a config; the counts come from the most specific place that states them."""
        architecture = architecture_of(config)
        depth = _integer(config, "num_hidden_layers")
        mtp = int(config.get(architecture.mtp_key, 0) or 0) if architecture.mtp_key else 0
        missing = [key for key in architecture.required if key not in config]
        if missing:
            raise ArchitectureError(
                f"config.json: {', '.join(missing)} not found; expected in every "
                f"{architecture.model_type} config"
            )
        layers = _layers(architecture, config, depth)
        router = _router(architecture, config)
        for layer in layers:
            if layer.candidates % router.groups:
                raise ArchitectureError(
                    f"config.json: layer {layer.index} has {layer.candidates} experts, expected a "
                    f"multiple of n_group = {router.groups}"
                )
        return cls(
            architecture=architecture,
            layers=layers,
            router=router,
            num_hidden_layers=depth,
            hidden_size=_integer(config, "hidden_size"),
            expert_size=_integer(config, architecture.expert_size_key),
            mtp_layers=mtp,
            config=config,
        )

    @property
    def is_uniform(self) -> bool:
        """One count, one top-k and no mapping in all layers: stock classes can load it."""
        return len({(x.experts, x.top_k) for x in self.layers}) == 1 and not any(
            x.mapping for x in self.layers
        )

    def layer(self, index: int) -> MoELayer:
        for layer in self.layers:
            if layer.index == index:
                return layer
        raise KeyError(index)


def read_block(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return config's ``liveprune`` block, or None.

    Raises:
        CheckpointError: the block's version is not the one this release writes (fail closed).
    """
    block = config.get(BLOCK_KEY)
    if block is None:
        return None
    version = block.get("version") if isinstance(block, dict) else None
    if version != BLOCK_VERSION:
        raise CheckpointError(
            f"config.json: {BLOCK_KEY}.version is {version!r}; this release reads {BLOCK_VERSION}"
        )
    return dict(block)


def is_moe_layer(architecture: Architecture, config: Mapping[str, Any], layer: int) -> bool:
    """Whether decoder layer ``layer`` has experts, by the family's dense-layer rules."""
    dense = architecture.dense
    if dense.first_k and layer < int(config.get(dense.first_k) or 0):
        return False
    if dense.listed and layer in (config.get(dense.listed) or ()):
        return False
    if dense.every:
        every = _positive(config.get(dense.every) or 1, dense.every)
        return (layer + dense.every_offset) % every == 0
    return True


def count_value(architecture: Architecture, config: Mapping[str, Any]) -> Any:
    """The raw value of the expert count, under its canonical key or an alias; None when absent.

    Raises:
        ArchitectureError: the keys contradict each other.
    """
    return _agreed(config, (architecture.count_key, *architecture.count_aliases))


def _agreed(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The one value stated under some of ``keys``; None when there is none."""
    found = {key: config[key] for key in keys if config.get(key) is not None}
    values = list(found.values())
    if any(value != values[0] for value in values[1:]):
        raise ArchitectureError(f"config.json: found {found}, expected one expert count")
    return values[0] if values else None


def _layers(
    architecture: Architecture, config: Mapping[str, Any], depth: int
) -> tuple[MoELayer, ...]:
    indices = [i for i in range(depth) if is_moe_layer(architecture, config, i)]
    counts = _counts(architecture, config, indices, depth)
    top_k = _integer(config, architecture.top_k_key)
    overrides = _by_layer(config.get("per_layer_config") or {}, "per_layer_config", depth)
    block = read_block(config) or {}
    widths = _by_layer(block.get("router_width") or {}, f"{BLOCK_KEY}.router_width", depth)
    mappings = _mappings(block, widths, depth)
    layers = []
    for index in indices:
        override = overrides.get(index, {})
        if not isinstance(override, Mapping):
            raise ArchitectureError(
                f"config.json: per_layer_config of layer {index} is {override!r}, "
                "expected an object"
            )
        stated = count_value(architecture, override)
        where = f"{architecture.count_key} of layer {index}"
        experts = _positive(counts[index] if stated is None else stated, where)
        k = _positive(override.get(architecture.top_k_key, top_k), architecture.top_k_key)
        width = _positive(widths.get(index, experts), f"router_width of layer {index}")
        layer = MoELayer(index, experts, k, width, mappings.get(index, ""))
        # A layer with fewer experts than top-k activates all it has.
        layer = replace(layer, top_k=min(k, layer.candidates))
        _check_mapping(layer)
        layers.append(layer)
    if not layers:
        raise ArchitectureError(
            f"config.json: no layer of this {architecture.model_type} has experts"
        )
    return tuple(layers)


def _mappings(block: Mapping[str, Any], widths: Mapping[int, Any], depth: int) -> dict[int, str]:
    """By layer, for those with a ``router_width``; what older releases wrote are router maps."""
    name = f"{BLOCK_KEY}.router_mapping"
    stated = _by_layer(block.get("router_mapping") or {}, name, depth)
    for index, mapping in stated.items():
        if mapping not in MAPPINGS or index not in widths:
            raise ArchitectureError(
                f"config.json: {name} of layer {index} is {mapping!r}, expected one of "
                f"{', '.join(MAPPINGS)} and a router_width"
            )
    return {index: stated.get(index, "router_map") for index in widths}


def _check_mapping(layer: MoELayer) -> None:
    """Constants stand for some experts at least; a map has every expert do some work."""
    least = {"constants": layer.experts + 1, "expert_map": layer.experts}.get(layer.mapping, 1)
    if layer.router_width < least:
        raise ArchitectureError(
            f"config.json: router_width of layer {layer.index} is {layer.router_width}, expected "
            f"at least {least} with {layer.mapping} and {layer.experts} experts"
        )


def _counts(
    architecture: Architecture, config: Mapping[str, Any], indices: list[int], depth: int
) -> dict[int, Any]:
    """Raw counts before ``per_layer_config``: from a scalar, a list, or a dict keyed by layer."""
    value: Any = _agreed(config, LIST_KEYS)
    if value is None:
        value = count_value(architecture, config)
    if isinstance(value, dict):
        stated = _by_layer(value, "expert counts")
        missing = [i for i in indices if i not in stated]
        if missing:
            raise ArchitectureError(f"config.json: expert counts miss the layers {missing}")
        return stated
    if isinstance(value, list):
        if len(value) == depth:
            return dict(enumerate(value))
        if len(value) == len(indices):
            return dict(zip(indices, value, strict=True))
        raise ArchitectureError(
            f"config.json: found a list of {len(value)} expert counts; expected {len(indices)} "
            f"(layers with experts) or {depth} (all layers)"
        )
    if not isinstance(value, int):
        raise ArchitectureError(
            f"config.json: found {architecture.count_key} = {value!r}, expected a number"
        )
    return dict.fromkeys(indices, value)


def _router(architecture: Architecture, config: Mapping[str, Any]) -> Router:
    renormalise = architecture.renormalise
    if renormalise is None:
        renormalise = bool(config.get("norm_topk_prob", architecture.renormalise_default))
    scoring = str(config.get("scoring_func") or architecture.scoring)
    if scoring not in ("softmax", "sigmoid"):
        raise ArchitectureError(
            f"config.json: scoring_func is {scoring!r}; expected 'softmax' or 'sigmoid'"
        )
    groups = int(config.get("n_group") or 1) if architecture.grouped else 1
    limited = groups > 1 and config.get("topk_method") != "greedy"
    top_groups = int(config.get("topk_group") or 1) if limited else 1
    if not 1 <= top_groups <= groups:
        raise ArchitectureError(
            f"config.json: topk_group is {top_groups}, expected 1 to n_group = {groups}"
        )
    return Router(
        scoring=scoring,
        renormalise=renormalise,
        groups=groups if limited else 1,
        top_groups=top_groups,
        # DeepSeek-V3 adds up a group's two best scores (of its only group, too); V2 takes the best.
        group_top=2 if architecture.grouped and architecture.side_tensors else 1,
        scale=float(config.get("routed_scaling_factor") or 1.0),
    )


def _by_layer(value: Any, name: str, depth: int | None = None) -> dict[int, Any]:
    """An object keyed by layer, with the keys as numbers (JSON has them as strings)."""
    if not isinstance(value, Mapping) or not all(str(key).isdecimal() for key in value):
        raise ArchitectureError(f"config.json: {name} is {value!r}, expected an object by layer")
    stated = {int(key): item for key, item in value.items()}
    beyond = [index for index in stated if depth is not None and index >= depth]
    if beyond:
        raise ArchitectureError(
            f"config.json: {name} states the layers {beyond}, the model has {depth}"
        )
    return stated


def _integer(config: Mapping[str, Any], key: str) -> int:
    return _positive(config.get(key), key)


def _positive(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArchitectureError(
            f"config.json: found {name} = {value!r}, expected a positive number"
        )
    return value
