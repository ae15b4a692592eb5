"""A checkpoint's tensors as torch tensors, one at a time, and a layer's experts by meaning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from liveprune.pruning.architectures import Architecture
from liveprune.pruning.checkpoint.layer_tensors import LayerTensors, layer_tensors
from liveprune.pruning.checkpoint.safetensors_io import TensorEntry, read_checkpoint, read_into
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.model_spec import ModelSpec

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Weights:
    """The tensors of an unquantised checkpoint; read on demand, never mapped, never cached."""

    def __init__(self, model: Path, spec: ModelSpec) -> None:
        """Read the headers and check the experts in them against the config.

        Raises:
            CheckpointError: files or tensors are missing, damaged or quantised.
        """
        self.model = model
        refuse_quantised(spec)
        self.entries = read_checkpoint(model).tensors
        self.layers = {
            block.layer.index: LayerWeights(block, spec.architecture)
            for block in layer_tensors(self.entries, spec)
        }
        for layer in self.layers.values():
            packed = layer.tensors.quantised(spec.architecture)
            if packed:
                raise CheckpointError(f"{model}: {packed}: found quantised experts")

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, in the checkpoint's dtype.

        Raises:
            CheckpointError: there is no such tensor, or it is not of a plain dtype.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.model}: tensor {name} is missing")
        return read_tensor(entry)


@dataclass(frozen=True)
class LayerWeights:
    """The gate and the experts of one layer, whichever way the checkpoint stores them."""

    tensors: LayerTensors
    architecture: Architecture

    def gate(self) -> Tensor:
        """Gate weight [router width, hidden]."""
        return read_tensor(self.tensors.gate[self.architecture.gate])

    def experts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One expert after the other, see ``expert``; those that the caller holds on to stay."""
        for index in range(self.tensors.layer.experts):
            yield self.expert(index)

    def expert(self, index: int) -> tuple[Tensor, Tensor]:
        """Gate and up as one [2 ffn, hidden]; down [hidden, ffn]; in the checkpoint's dtype."""
        if self.tensors.fused:
            fused = self.tensors.fused
            return (
                read_tensor(fused[self.architecture.fused_gate_up], index),
                read_tensor(fused[self.architecture.fused_down], index),
            )
        own = self.tensors.experts[index]
        gate, up, down = (own[f"{name}.weight"] for name in self.architecture.experts)
        return torch.cat([read_tensor(gate), read_tensor(up)]), read_tensor(down)


def read_tensor(entry: TensorEntry, index: int | None = None) -> Tensor:
    """Read a tensor, or its slice ``index`` along the first axis.

    Raises:
        CheckpointError: the dtype is not a plain floating-point one.
    """
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"{entry.name}: dtype is {entry.dtype}, expected one of {', '.join(DTYPES)}"
        )
    shape = entry.shape if index is None else entry.shape[1:]
    tensor = torch.empty(shape, dtype=DTYPES[entry.dtype])
    size = math.prod(shape) * tensor.element_size()
    with entry.path.open("rb") as file:
        view = tensor.view(-1).view(torch.uint8).numpy().data
        read_into(file.fileno(), view, entry.start + (index or 0) * size)
    return tensor


def refuse_quantised(spec: ModelSpec) -> None:
    """Refuse a checkpoint whose tensors are not plain numbers.

    Raises:
        CheckpointError: naming the quantisation method.
    """
    quantisation = spec.config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "of unknown method")
        raise CheckpointError(
            f"config.json: found quantization_config ({method}); reading weights and calibrating "
            f"expect bfloat16, float16 or float32. A plan made from those fits this model too"
        )
