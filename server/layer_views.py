"""What a variant leaves of each layer, expert by expert: what people look at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from liveprune.pruning.layer_plan import LayerPlan, Matrix, NeuronMap
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan


@dataclass(frozen=True)
class LayerView:
    """One layer; an expert of the base that is in no list is dropped."""

    layer: int
    experts: int
    """Of the base model."""
    remaining: int
    """Under the variant."""
    top_k: int
    kept: tuple[int, ...]
    """Base experts that there are unchanged, ascending."""
    merged: tuple[int, ...]
    """Base experts that only live on as parts of merged ones, ascending."""
    constant: tuple[int, ...]
    """Base experts that answer with a constant vector, ascending."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def layer_views(plan: Plan | None, spec: ModelSpec) -> tuple[LayerView, ...]:
    """Every layer with experts, in order; None stands for the base model."""
    if plan is None:
        return tuple(
            LayerView(x.index, x.experts, x.experts, x.top_k, tuple(range(x.experts)), (), ())
            for x in spec.layers
        )
    return tuple(_view(layer) for layer in plan.layers)


def _view(layer: LayerPlan) -> LayerView:
    kept, merged = _sources(layer)
    return LayerView(
        layer.layer,
        layer.experts,
        layer.kept_experts,
        layer.top_k,
        kept,
        tuple(sorted(set(merged) - set(kept))),
        layer.pruned if layer.constants is not None else (),
    )


def _sources(layer: LayerPlan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Base experts that are copied, and those that are parts of new ones."""
    if layer.merge is not None:
        parts = layer.merge != 0
        copied = (parts.sum(1) == 1) & (layer.merge.max(1) == 1)
    elif layer.neuron_map is not None and layer.neuron_shares is not None:
        parts = _neuron_parts(layer.neuron_map, layer.neuron_shares, layer.kept_experts)
        # One source gives every neuron once: at most their order differs.
        copied = parts.sum(1) == 1
    else:
        return layer.kept, ()
    return _ids(parts[copied].any(0)), _ids(parts[~copied].any(0))


def _neuron_parts(targets: NeuronMap, shares: Matrix, new: int) -> npt.NDArray[np.bool_]:
    """[new, experts]: whether some neuron of the old expert goes into the new one."""
    experts, ffn = targets.shape
    parts = np.zeros((new, experts), dtype=bool)
    for old in range(experts):
        if shares[old] > 0:
            found = targets[old]
            parts[np.unique(found[found >= 0] // ffn), old] = True
    return parts


def _ids(flags: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.flatnonzero(flags))
