"""Neuron maps by target: where the neurons of each new expert come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from liveprune.pruning.layer_plan import LayerPlan

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Source:
    """What one old expert gives to a new one."""

    expert: int
    neurons: Indices
    """[n] of the old expert."""
    targets: Indices
    """[n] of the new expert."""
    weights: npt.NDArray[np.float32]
    """[n]; over all sources of a target they sum to 1."""


def neuron_sources(
    layer: LayerPlan, new: int, first: int = 0, size: int | None = None
) -> list[Source]:
    """The sources of new expert ``new``, ascending by old expert.

    Args:
        layer: with a neuron map.
        new: which new expert.
        first: first of its neurons that are asked for; ``Source.targets`` count from there.
        size: how many; None: all from ``first``.

    Raises:
        ValueError: the layer has no neuron map.
    """
    if layer.neuron_map is None or layer.neuron_shares is None:
        raise ValueError(f"layer {layer.layer}: found no neuron map")
    ffn = layer.neuron_map.shape[1]
    count = ffn - first if size is None else size
    begin = new * ffn + first
    experts, neurons = np.nonzero((layer.neuron_map >= begin) & (layer.neuron_map < begin + count))
    targets = layer.neuron_map[experts, neurons].astype(np.int64) - begin
    shares = layer.neuron_shares[experts].astype(np.float64)
    weights = shares / np.bincount(targets, shares, minlength=count)[targets]
    return [
        Source(int(i), neurons[mine], targets[mine], weights[mine].astype(np.float32))
        for i in np.unique(experts)
        # Without a share it gives nothing, and need not be read.
        if (mine := (experts == i) & (shares > 0)).any()
    ]


def only_source(layer: LayerPlan, new: int) -> int | None:
    """The old expert that new expert ``new`` is, neuron by neuron; None if it is a true merge."""
    sources = neuron_sources(layer, new)
    if len(sources) == 1 and np.array_equal(sources[0].neurons, sources[0].targets):
        return sources[0].expert
    return None
