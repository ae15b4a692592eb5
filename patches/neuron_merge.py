"""Merged experts that are gathered neuron by neuron, from the checkpoint into a packed row.

Rows in memory are packed, and a rank's new neurons may come from any rank's old ones, so the
sources are read again, whole, one at a time. Takes the memory of one new expert's slice in float32
and of one whole old expert, beside the writer's own buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liveprune.patches.expert_packing import Packing
from liveprune.patches.expert_reader import ExpertReader
from liveprune.patches.row_merge import check_range
from liveprune.pruning.errors import EngineError
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.neuron_sources import neuron_sources


@dataclass(frozen=True, eq=False)
class NeuronMerge:
    """The gathered experts of one layer's plan, and the spare rows that they go to."""

    plan: LayerPlan
    rows: tuple[int, ...]
    experts: tuple[int, ...]
    """New expert for each row."""

    def new_expert(self, row: int) -> int:
        return self.experts[self.rows.index(row)]


def write_neurons(
    merge: NeuronMerge,
    row: int,
    reader: ExpertReader,
    packing: Packing,
    row13: torch.Tensor,
    row2: torch.Tensor,
) -> None:
    """Compute one new expert's slice and pack it into its row.

    Sums in float32 and rounds once, to the row's dtype.

    Args:
        merge: of the layer.
        row: one of its rows.
        reader: of the rank.
        packing: of the layer.
        row13: the row, contiguous, on any device.
        row2: the same of the second matrix.

    Raises:
        PlanError: a sum is beyond the range of the dtype.
        CheckpointError: a source cannot be read.
    """
    layer = merge.plan.layer
    if merge.plan.neuron_map is None or merge.plan.neuron_map.shape[1] != reader.spec.expert_size:
        raise EngineError(f"layer {layer}: the neuron map is not of this model's experts")
    size, hidden = packing.size, packing.hidden
    sums13 = torch.zeros(2 * size, hidden)
    sums2 = torch.zeros(hidden, size)
    gate, up = sums13[:size], sums13[size:]
    for source in neuron_sources(merge.plan, merge.new_expert(row), reader.first, size):
        old13, old2 = reader.read_whole(layer, source.expert)
        neurons, targets = torch.from_numpy(source.neurons), torch.from_numpy(source.targets)
        weights = torch.from_numpy(source.weights)
        width = len(old13) // 2
        gate.index_add_(0, targets, old13[neurons].float() * weights[:, None])
        up.index_add_(0, targets, old13[width + neurons].float() * weights[:, None])
        sums2.index_add_(1, targets, old2[:, neurons].float() * weights)
    for sums in (sums13, sums2):
        check_range(sums, row13.dtype)
    packed = packing.pack(sums13.to(row13.dtype), sums2.to(row2.dtype))
    for target, made in zip((row13, row2), packed, strict=True):
        target.copy_(made)
