"""Bytes of weights that must be resident for a plan alone, from shard headers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from liveprune.pruning.checkpoint.layer_tensors import LayerTensors, layer_tensors
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint, tensor_bytes
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Plan

_ROW_ID = 8
"""An expert map is a row of the routing tables: int64."""


@dataclass(frozen=True)
class ResidentBytes:
    """Bytes as the checkpoint stores its numbers; KV cache and activations aside."""

    experts: int
    """Rows of the experts that there are after the plan."""
    gates: int
    """Gate rows, with the biases that go with them."""
    maps: int
    """Router maps, expert maps and constants."""
    rest: int
    """Everything else: attention, embeddings, shared experts, norms."""

    @property
    def total(self) -> int:
        return self.experts + self.gates + self.maps + self.rest


class ModelBytes:
    """The sizes in one checkpoint's headers."""

    def __init__(self, model: Path, spec: ModelSpec) -> None:
        """Read the headers of ``model``, the checkpoint of ``spec``.

        Raises:
            CheckpointError: the files are damaged or contradict the config.
        """
        checkpoint = read_checkpoint(model)
        self._layers = {x.layer.index: x for x in layer_tensors(checkpoint.tensors, spec)}
        own = [_base(block) for block in self._layers.values()]
        self._rest = checkpoint.size - sum(sum(parts) for parts in own)

    def of(self, plan: Plan | None) -> ResidentBytes:
        """What a plan, or the full model (None), needs resident."""
        parts = [
            _base(block) if plan is None else _planned(block, plan.layer(index))
            for index, block in self._layers.items()
        ]
        experts, gates, maps = (sum(part) for part in zip(*parts, strict=True))
        return ResidentBytes(experts, gates, maps, self._rest)


def _base(block: LayerTensors) -> tuple[int, int, int]:
    gates = sum(entry.size for entry in block.gate.values())
    return block.expert_bytes, gates, sum(entry.size for entry in block.mapping.values())


def _planned(block: LayerTensors, layer: LayerPlan) -> tuple[int, int, int]:
    """Bytes of expert rows, of gate rows and of maps of one layer."""
    _, gates, base_map = _base(block)
    maps = base_map  # with one, a plan keeps the layer whole (plan_guards)
    if layer.router_map is not None:
        maps += tensor_bytes("F32", layer.router_map.shape)
    if layer.constants is not None:
        maps += tensor_bytes("F32", layer.constants.shape)
    maps += _ROW_ID * len(layer.expert_map)
    if block.layer.mapping:
        return _expert_rows(block, layer), gates, maps
    return _expert_rows(block, layer), gates // layer.experts * layer.router_width, maps


def _expert_rows(block: LayerTensors, layer: LayerPlan) -> int:
    if block.fused or layer.merges:
        # Experts are alike, or they could neither be fused nor merged.
        return block.expert_bytes // layer.experts * layer.kept_experts
    return sum(entry.size for i in layer.kept for entry in block.experts[i].values())
