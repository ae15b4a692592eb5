"""One thread's way from the checkpoint to a row, with buffers that it uses again and again."""

from __future__ import annotations

import torch

from liveprune.patches.expert_packing import Packing, Shape
from liveprune.patches.expert_reader import ExpertReader


class RowWriter:
    """Not for several threads at once: fresh memory for each expert would cost more than reading.

    On CUDA a row is packed in pinned memory and copied on the current stream; synchronise it
    before the next ``write``.
    """

    def __init__(self, reader: ExpertReader) -> None:
        self._reader = reader
        self._buffers: dict[tuple[bool, Shape], torch.Tensor] = {}

    def write(
        self, layer: int, expert: int, packing: Packing, row13: torch.Tensor, row2: torch.Tensor
    ) -> None:
        """Read and pack one expert into its rows (shapes: ``packing.row_shapes``, contiguous).

        Raises:
            CheckpointError: the expert cannot be read.
        """
        on_device = row13.device.type != "cpu"
        packed13, packed2 = row13, row2
        if on_device:
            packed13, packed2 = (self._buffer(x, pinned=True) for x in packing.row_shapes())
        if packing.is_identity:
            self._reader.read_into(layer, expert, packed13, packed2)
        else:
            w13, w2 = (self._buffer(x, pinned=False) for x in packing.expert_shapes())
            self._reader.read_into(layer, expert, w13, w2)
            packing.pack_into(w13, w2, packed13, packed2)
        if on_device:
            row13.copy_(packed13, non_blocking=True)
            row2.copy_(packed2, non_blocking=True)

    def _buffer(self, shape: Shape, *, pinned: bool) -> torch.Tensor:
        key = pinned, shape  # [2 * size, hidden] and [hidden, size] are never the same shape
        if key not in self._buffers:
            self._buffers[key] = torch.empty(shape, dtype=self._reader.dtype, pin_memory=pinned)
        return self._buffers[key]
