"""How one expert becomes a row of vLLM's fused expert tensors, in exactly vLLM's bytes.

vLLM packs whole layers after loading (``process_weights_after_loading``). All the layouts known
here are permutations and zero padding within one expert, so that packing one expert gives its row
of the packed layer, and merging packed rows gives the packed merged expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from liveprune.pruning.errors import EngineError

EXPECTED = "a CPU kernel of vLLM, TRITON or FlashInfer CUTLASS on CUDA"
"""The layouts that rows can be made for, in words."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """The layout of one layer's rows."""

    hidden: int
    size: int
    """Intermediate size of this rank."""
    padded: int
    """The same, rounded up for the kernel."""
    isa: str | None = None
    """Instruction set that vLLM's CPU kernel packs for; None: not packed."""
    up_first: bool = False
    """``w13`` has the up rows before the gate rows."""

    @classmethod
    def of(cls, layer: Any) -> Packing:
        """Find the layout of ``layer``, vLLM's RoutedExperts; its parameters may be on ``meta``.

        Raises:
            EngineError: there is no known way to make single rows of this layer; names what was
                found and what was expected.
        """
        from vllm.model_executor.layers.fused_moe.experts import cpu_moe
        from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
            UnquantizedFusedMoEMethod,
        )
        from vllm.platforms import current_platform

        method, config = layer.quant_method, layer.moe_config
        if type(method) is not UnquantizedFusedMoEMethod:
            raise _refusal(layer, f"experts run by {type(method).__name__}")
        found = _unsupported(config)
        if found is not None:
            raise _refusal(layer, found)
        hidden, size = config.hidden_dim, config.intermediate_size_per_partition
        kernel, backend = method.experts_cls, method.unquantized_backend
        if _packs_as(cpu_moe.CPUUnquantizedExperts, kernel):
            if cpu_moe.is_zentorch_moe_supported(layer):
                return cls(hidden, size, size)
            return cls(hidden, size, kernel._padded_intermediate_size(config), kernel.isa)  # noqa: SLF001 - vLLM's own rule
        if current_platform.is_cuda() and backend == UnquantizedMoeBackend.TRITON:
            return cls(hidden, size, size)
        if current_platform.is_cuda() and backend == UnquantizedMoeBackend.FLASHINFER_CUTLASS:
            return cls(hidden, size, size, up_first=True)
        name = "no kernel" if kernel is None else kernel.__name__
        raise _refusal(layer, f"the layout of {backend.value} ({name})")

    @property
    def is_identity(self) -> bool:
        """Rows are the expert as it was read."""
        return self.isa is None and not self.up_first and self.padded == self.size

    def row_shapes(self) -> tuple[Shape, Shape]:
        """Of a packed row of ``w13`` and of ``w2``."""
        return (2 * self.padded, self.hidden), (self.hidden, self.padded)

    def expert_shapes(self) -> tuple[Shape, Shape]:
        """Of an expert's ``w13`` [2 * size, hidden] and ``w2`` [hidden, size] before packing."""
        return (2 * self.size, self.hidden), (self.hidden, self.size)

    def pack(self, w13: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the packed rows of one expert (shapes: ``row_shapes``), in new memory."""
        row13, row2 = (torch.empty(shape, dtype=w13.dtype) for shape in self.row_shapes())
        self.pack_into(w13, w2, row13, row2)
        return row13, row2

    def pack_into(
        self, w13: torch.Tensor, w2: torch.Tensor, row13: torch.Tensor, row2: torch.Tensor
    ) -> None:
        """Pack one expert into rows that are there already.

        Args:
            w13: [2 * size, hidden] gate rows over up rows, contiguous, on the CPU.
            w2: [hidden, size], contiguous, on the CPU.
            row13: contiguous, of the first of ``row_shapes``, same dtype, on the CPU.
            row2: contiguous, of the second.
        """
        gate, up = w13[: self.size], w13[self.size :]
        if self.padded != self.size:
            rows, columns = (0, 0, 0, self.padded - self.size), (0, self.padded - self.size)
            w13 = torch.cat([torch.nn.functional.pad(half, rows) for half in (gate, up)])
            w2 = torch.nn.functional.pad(w2, columns)
        if self.isa is not None:
            # What vLLM's cpu_prepack_moe_weight calls, with the row as its output.
            prepack = torch.ops._C.prepack_moe_weight  # noqa: SLF001
            prepack(w13[None], row13[None], self.isa)
            prepack(w2[None], row2[None], self.isa)
            return
        if self.up_first:
            row13[: self.size], row13[self.size :] = up, gate
        else:
            row13.copy_(w13)
        row2.copy_(w2)


def _unsupported(config: Any) -> str | None:
    """The first thing in a layer's FusedMoEConfig that rows cannot be made for, or None."""
    found = {
        "experts with biases": config.has_bias,
        "experts without a gate projection": not config.is_act_and_mul,
        "expert parallelism": config.moe_parallel_config.use_ep,
        f"a hidden size of {config.hidden_dim_unpadded} padded to {config.hidden_dim}": (
            config.hidden_dim != config.hidden_dim_unpadded
        ),
        "an intermediate size padded at creation": (
            config.intermediate_size_per_partition
            != config.intermediate_size_per_partition_unpadded
        ),
        "slices padded to blocks": config.tp_shard_with_padding,
    }
    return next((name for name, is_there in found.items() if is_there), None)


def _packs_as(known: Any, kernel: Any) -> bool:
    """Whether ``kernel`` is ``known``, or a subclass that leaves its packing alone."""
    steps = ("process_weights_after_loading", "_pad_moe_intermediate")
    return (
        kernel is not None
        and issubclass(kernel, known)
        and all(getattr(kernel, step) is getattr(known, step) for step in steps)
    )


def _refusal(layer: Any, found: str) -> EngineError:
    return EngineError(
        f"{layer.layer_name}: found {found}; expected plain gated experts without biases, run by "
        f"{EXPECTED}"
    )
