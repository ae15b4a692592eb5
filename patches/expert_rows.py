"""The expert rows of one layer: fixed addresses, memory that comes and goes.

Row e below the number of base experts is base expert e; the rows after them are spare, for merged
experts. vLLM's parameters are views of the first rows, up to the last one in use.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from liveprune.patches.elastic_memory import elastic_tensor
from liveprune.patches.expert_packing import Packing


class ExpertRows:
    """``w13`` and ``w2`` of one vLLM layer, packed as its kernel wants them.

    Not for several threads at once: ``LiveWorker`` and its filler share a lock.
    """

    def __init__(self, layer: Any, packing: Packing, rows: int, device: torch.device) -> None:
        """``layer``: vLLM's RoutedExperts, its parameters still without memory."""
        self._layer = layer
        dtype = layer.w13_weight.dtype
        shape13, shape2 = packing.row_shapes()
        self._tensors = (
            elastic_tensor((rows, *shape13), dtype, device),
            elastic_tensor((rows, *shape2), dtype, device),
        )
        self._resident: frozenset[int] = frozenset()
        # Kernels on CUDA skip ids from this number on; the spare rows are experts, too.
        layer.global_num_experts = rows
        self.expose(rows)

    @property
    def w13(self) -> torch.Tensor:
        """[rows, ...] packed gate and up projections."""
        return self._tensors[0].tensor

    @property
    def w2(self) -> torch.Tensor:
        """[rows, ...] packed down projections."""
        return self._tensors[1].tensor

    @property
    def resident(self) -> frozenset[int]:
        """Rows that have memory."""
        return self._resident

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of both tensors."""
        return sum(x.tensor[0].numel() * x.tensor.element_size() for x in self._tensors)

    def commit(self, rows: Collection[int]) -> None:
        """Give rows memory; what they hold is undefined until written."""
        for tensor in self._tensors:
            tensor.commit(rows)
        self._resident |= frozenset(rows)

    def release(self, rows: Collection[int]) -> int:
        """Take the memory of rows that nothing refers to; returns the bytes given back."""
        self._resident -= frozenset(rows)
        return sum(tensor.release(rows) for tensor in self._tensors)

    def expose(self, rows: int) -> None:
        """Show vLLM the first ``rows`` rows: its CPU kernel takes time for each it could meet.

        On CUDA all rows are shown from the start, since captured graphs know their number.
        """
        if self.w13.device.type != "cpu":
            rows = len(self.w13)
        from vllm.model_executor.utils import replace_parameter

        for name, tensor in zip(("w13_weight", "w2_weight"), self._tensors, strict=True):
            parameter = getattr(self._layer, name)
            if parameter.device.type == "meta":
                replace_parameter(self._layer, name, tensor.tensor[:rows])
            else:
                parameter.data = tensor.tensor[:rows]
