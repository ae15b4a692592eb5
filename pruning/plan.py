"""Plans: the recipe of one variant, as pure data.

A plan states for every layer with experts which are kept, or how they merge (``merge``), how the
router's probabilities map onto the result (``router_map``), and how many are active (``top_k``).
It knows nothing about files of the model; ``plan_guards`` checks it against one.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from liveprune.pruning.errors import PlanError

Matrix = npt.NDArray[np.float32]

SMALLEST_SUM = 1e-9
"""Scores under a router map may be negative, so their sum, which divides them, may come near zero:
whoever routes by a map keeps it this far from zero."""


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer of a plan.

    Three forms:

    * pruned: ``kept`` names the expert ids that stay, ascending; gate rows are sliced with them;
    * merged under the old router (EEP): ``merge`` and ``router_map`` [kept, experts], the gate
      keeps all rows, ``kept`` is empty;
    * merged with rows dropped: ``merge`` [kept, experts], and ``kept`` names the gate row of each
      new expert.
    """

    layer: int
    """Index among all decoder layers."""
    experts: int
    """Experts of the base model in this layer."""
    top_k: int
    """Active experts per token."""
    kept: tuple[int, ...] = ()
    merge: Matrix | None = None
    """[kept, experts] float32: new expert j = sum over i of merge[j, i] * expert i (EEP, W_EM)."""
    router_map: Matrix | None = None
    """[kept, experts] float32: score j = sum over i of router_map[j, i] * p_i (EEP, W_RM)."""

    def __post_init__(self) -> None:
        where = f"layer {self.layer}"
        for name in ("layer", "experts", "top_k"):
            object.__setattr__(self, name, _whole(getattr(self, name), where, name))
        object.__setattr__(self, "kept", tuple(_whole(i, where, "kept id") for i in self.kept))
        for name in ("merge", "router_map"):
            matrix = getattr(self, name)
            if matrix is not None:
                object.__setattr__(self, name, _frozen(matrix, where, name, self.experts))
        if self.router_map is None:
            self._check_kept(where)
        else:
            self._check_router_map(where, self.router_map)
        if not 1 <= self.top_k <= self.kept_experts:
            raise PlanError(
                f"{where}: top_k is {self.top_k}, expected 1 to {self.kept_experts} (experts kept)"
            )

    def _check_kept(self, where: str) -> None:
        bad = [i for i in self.kept if not 0 <= i < self.experts]
        if bad:
            raise PlanError(f"{where}: found kept ids {bad}, expected 0 to {self.experts - 1}")
        if not self.kept:
            raise PlanError(f"{where}: found no kept experts, expected at least 1")
        if list(self.kept) != sorted(set(self.kept)):
            raise PlanError(
                f"{where}: found kept ids {list(self.kept)}, expected ascending without repeats"
            )
        if self.merge is not None and len(self.kept) != len(self.merge):
            raise PlanError(
                f"{where}: found {len(self.kept)} kept ids for {len(self.merge)} merged experts"
            )

    def _check_router_map(self, where: str, router_map: Matrix) -> None:
        if self.merge is None:
            raise PlanError(f"{where}: found a router_map without a merge matrix")
        if self.kept:
            raise PlanError(f"{where}: found both a router_map and kept ids; expected one of them")
        if router_map.shape != self.merge.shape:
            raise PlanError(
                f"{where}: router_map is {router_map.shape}, expected {self.merge.shape} like merge"
            )

    @property
    def kept_experts(self) -> int:
        """Number of experts after the plan."""
        return len(self.kept) if self.merge is None else len(self.merge)

    @property
    def router_width(self) -> int:
        """Gate rows after the plan."""
        return self.experts if self.router_map is not None else self.kept_experts

    @property
    def is_identity(self) -> bool:
        """All experts kept as they are."""
        return self.merge is None and len(self.kept) == self.experts

    def matrices(self) -> dict[str, Matrix]:
        """The layer's matrices by tensor name."""
        named = {"merge": self.merge, "router_map": self.router_map}
        return {f"layers.{self.layer}.{k}": v for k, v in named.items() if v is not None}


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
        depth = _whole(self.num_hidden_layers, "plan", "num_hidden_layers")
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
        state = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16)
        for layer in self.layers:
            for name, matrix in sorted(layer.matrices().items()):
                state.update(f"{name}{matrix.shape}".encode())
                state.update(matrix.astype("<f4").tobytes())
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
        """Expressible as an ordinary checkpoint: one count, one top-k, no router map."""
        return (
            len({(x.kept_experts, x.top_k) for x in self.layers}) == 1 and not self.has_router_map
        )

    @property
    def has_router_map(self) -> bool:
        return any(layer.router_map is not None for layer in self.layers)

    @property
    def merges(self) -> bool:
        """Some layer computes new expert weights."""
        return any(layer.merge is not None for layer in self.layers)


def _whole(value: Any, where: str, name: str) -> int:
    """A plain int; NumPy integers are taken, since they would not survive JSON."""
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise PlanError(f"{where}: {name} is {value!r}, expected a whole number")
    return operator.index(value)


def _frozen(matrix: Any, where: str, name: str, experts: int) -> Matrix:
    try:
        with np.errstate(over="ignore"):  # becomes infinity, refused below
            array = np.asarray(matrix, dtype=np.float32).copy(order="C")
    except (TypeError, ValueError) as error:
        raise PlanError(f"{where}: {name} is not a matrix of numbers: {error}") from error
    if array.ndim != 2 or array.shape[1] != experts or not 1 <= array.shape[0] <= experts:
        raise PlanError(f"{where}: {name} is {array.shape}, expected [1..{experts}, {experts}]")
    if not np.isfinite(array).all():
        raise PlanError(f"{where}: {name} holds NaN or infinity")
    array.setflags(write=False)
    return array
