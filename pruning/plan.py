"""Plans: the recipe of one variant, as pure data.

A plan states for every layer with experts which are kept, or how they merge, how the router's
choice maps onto the result, and how many are active (``layer_plan``). It knows nothing about files
of the model; ``plan_guards`` checks it against one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from liveprune.pruning.errors import PlanError
from liveprune.pruning.layer_plan import SMALLEST_SUM, LayerPlan, Matrix, NeuronMap, whole

__all__ = ["SMALLEST_SUM", "LayerPlan", "Lineage", "Matrix", "NeuronMap", "Plan"]


@dataclass(frozen=True)
class Lineage:
    """Where a plan came from. Not part of its digest: equal plans are equal however found."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    calibration: str | None = None
    """Digest of the calibration rows as tokenised."""
    versions: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    """Numbers that led to the plan, e.g. the saliency per layer and expert."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The recipe for one variant of a base model; immutable and content-hashed."""

    architecture: str
    """``model_type`` of the base model."""
    num_hidden_layers: int
    layers: tuple[LayerPlan, ...]
    """Every layer with experts, ascending by index."""
    lineage: Lineage
    base_model: str = ""
    """Name or path of the base model, for people; not part of the digest."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        depth = whole(self.num_hidden_layers, "plan", "num_hidden_layers")
        object.__setattr__(self, "num_hidden_layers", depth)
        indices = [layer.layer for layer in self.layers]
        if not indices:
            raise PlanError("plan: found no layers, expected at least 1")
        if indices != sorted(set(indices)):
            raise PlanError(f"plan: found layers {indices}, expected ascending without repeats")
        if indices[0] < 0 or indices[-1] >= self.num_hidden_layers:
            raise PlanError(
                f"plan: found layers {indices[0]} to {indices[-1]}, "
                f"expected 0 to {self.num_hidden_layers - 1}"
            )

    @cached_property
    def digest(self) -> str:
        """Content digest, 32 hex digits: what the plan computes, not how it was found."""
        content = {
            "architecture": self.architecture,
            "num_hidden_layers": self.num_hidden_layers,
            "layers": [
                [x.layer, x.experts, x.top_k, x.kept, x.merge is not None, x.router_map is not None]
                for x in self.layers
            ],
        }
        maps = {str(x.layer): x.expert_map for x in self.layers if x.expert_map}
        if maps:
            content["expert_maps"] = maps
        state = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16)
        for layer in self.layers:
            for name, matrix in sorted(layer.matrices().items()):
                state.update(f"{name}{matrix.shape}".encode())
                state.update(matrix.astype(matrix.dtype.newbyteorder("<")).tobytes())
        return state.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def layer(self, index: int) -> LayerPlan:
        for layer in self.layers:
            if layer.layer == index:
                return layer
        raise KeyError(index)

    @property
    def is_uniform(self) -> bool:
        """Expressible as an ordinary checkpoint: one count, one top-k, sliced gates."""
        return (
            len({(x.kept_experts, x.top_k) for x in self.layers}) == 1 and not self.keeps_gate_rows
        )

    @property
    def keeps_gate_rows(self) -> bool:
        """Some layer routes over the base's experts and maps its choice onto the plan's."""
        return any(layer.keeps_gate_rows for layer in self.layers)

    @property
    def has_router_map(self) -> bool:
        return any(layer.router_map is not None for layer in self.layers)

    @property
    def has_matrices(self) -> bool:
        """Some layer needs more than ids to be said."""
        return any(layer.matrices() for layer in self.layers)

    @property
    def merges(self) -> bool:
        """Some layer computes new expert weights."""
        return any(layer.merges for layer in self.layers)
