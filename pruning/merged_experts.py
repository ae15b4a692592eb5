"""The experts that a layer of a plan leaves, computed from those that there were."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from liveprune.pruning.layer_plan import LayerPlan, Matrix
from liveprune.pruning.neuron_sources import Source, neuron_sources


def merged_experts(layer: LayerPlan, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The new experts, as transformers holds them: all in one tensor per projection.

    Sums are taken in float32, one new expert at a time, in the order of the old ones, and rounded
    once. An expert that is merely kept is a copy. Beside what comes in and goes out, one expert in
    float32 is in memory, and what one old expert gives to it.

    Args:
        layer: what there is to be.
        gate_up: [experts, 2 ffn, hidden]; of each expert the gate's rows, then those of up.
        down: [experts, hidden, ffn].

    Returns:
        [new, 2 ffn, hidden] and [new, hidden, ffn], in the dtypes that came in.
    """
    if not layer.merges:
        kept = list(layer.kept)
        return gate_up[kept], down[kept]
    new_gate_up = gate_up.new_empty(layer.kept_experts, *gate_up.shape[1:])
    new_down = down.new_empty(layer.kept_experts, *down.shape[1:])
    for new in range(layer.kept_experts):
        if layer.merge is not None:
            new_gate_up[new] = _mixed(layer.merge[new], gate_up)
            new_down[new] = _mixed(layer.merge[new], down)
        else:
            sources = neuron_sources(layer, new)
            new_gate_up[new], new_down[new] = _gathered(sources, gate_up, down)
    return new_gate_up, new_down


def _mixed(coefficients: Matrix, weight: Tensor) -> Tensor:
    """Of [experts] coefficients and [experts, ...]; float32."""
    total = torch.zeros_like(weight[0], dtype=torch.float32)
    for old in np.flatnonzero(coefficients).tolist():
        total.add_(weight[old].float(), alpha=float(coefficients[old]))
    return total


def _gathered(sources: Sequence[Source], gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Neuron by neuron; float32."""
    ffn = down.shape[2]
    rows = torch.zeros_like(gate_up[0], dtype=torch.float32)
    columns = torch.zeros_like(down[0], dtype=torch.float32)
    for source in sources:
        neurons, targets, weights = (
            torch.from_numpy(x).to(down.device)
            for x in (source.neurons, source.targets, source.weights)
        )
        for half in (0, ffn):
            part = gate_up[source.expert, half + neurons].float() * weights[:, None]
            rows.index_add_(0, half + targets, part)
        columns.index_add_(1, targets, down[source.expert][:, neurons].float() * weights)
    return rows, columns
