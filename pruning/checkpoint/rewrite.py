"""What a plan makes of a checkpoint's tensors: new names and shapes, and where the bytes are.

Pure bookkeeping: nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from liveprune.pruning.architectures import Architecture
from liveprune.pruning.checkpoint.layer_tensors import LayerTensors
from liveprune.pruning.checkpoint.merge import Merge, Span
from liveprune.pruning.checkpoint.safetensors_io import TensorEntry
from liveprune.pruning.checkpoint.shard_writer import NewTensor
from liveprune.pruning.plan import LayerPlan, Matrix, Plan


@dataclass(frozen=True, eq=False)
class MergedRow:
    """Row ``row`` of ``merge``."""

    merge: Merge
    row: int

    @property
    def size(self) -> int:
        return self.merge.size


@dataclass(frozen=True)
class Literal:
    """Bytes that come from the plan."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)


Part = Span | MergedRow | Literal


@dataclass(frozen=True)
class Output(NewTensor):
    """A tensor to be written, and what it is made of, in order."""

    parts: tuple[Part, ...]


def unchanged(entry: TensorEntry) -> Output:
    """The tensor as it is."""
    return Output(entry.name, entry.dtype, entry.shape, (_whole(entry),))


def rewrite(
    blocks: Iterable[LayerTensors], plan: Plan, architecture: Architecture
) -> dict[str, tuple[Output, ...]]:
    """Map each tensor that the plan changes to what takes its place, possibly nothing."""
    changes: dict[str, tuple[Output, ...]] = {}
    for block in blocks:
        layer = plan.layer(block.layer.index)
        if not layer.is_identity:
            changes.update(_gate(block, layer, architecture))
            changes.update(_fused(block, layer) if block.fused else _classic(block, layer))
    return changes


def _gate(
    block: LayerTensors, layer: LayerPlan, architecture: Architecture
) -> dict[str, tuple[Output, ...]]:
    """Slice the router to the kept ids, or keep it whole beside the new router map."""
    if layer.router_map is None:
        return {entry.name: (_sliced(entry, layer.kept),) for entry in block.gate.values()}
    gate = block.gate[architecture.gate]
    matrix = np.asarray(layer.router_map, dtype="<f4")
    name = f"{block.prefix}{architecture.router_map}"
    router_map = Output(name, "F32", matrix.shape, (Literal(matrix.tobytes()),))
    return {gate.name: (unchanged(gate), router_map)}


def _classic(block: LayerTensors, layer: LayerPlan) -> dict[str, tuple[Output, ...]]:
    """New expert j stands in the place of the one it continues: kept id j, or old expert j."""
    changes: dict[str, tuple[Output, ...]] = {entry.name: () for entry in block.expert_tensors()}
    homes = layer.kept or tuple(range(layer.kept_experts))
    merged = {}
    if layer.merge is not None:
        for key, entry in block.experts[0].items():
            sources = [_whole(block.experts[i][key]) for i in range(layer.experts)]
            merged[key] = _merged(layer.merge, sources, entry.dtype)
    for new, home in enumerate(homes):
        for key, entry in block.experts[home].items():
            name = f"{block.prefix}experts.{new}.{key}"
            part = merged[key][new] if merged else _whole(entry)
            changes[entry.name] = (Output(name, entry.dtype, entry.shape, (part,)),)
    return changes


def _fused(block: LayerTensors, layer: LayerPlan) -> dict[str, tuple[Output, ...]]:
    changes: dict[str, tuple[Output, ...]] = {}
    for entry in block.fused.values():
        if layer.merge is None:
            output = _sliced(entry, layer.kept)
        else:
            sources = [_slices(entry, i, i + 1) for i in range(layer.experts)]
            parts = tuple(_merged(layer.merge, sources, entry.dtype))
            output = Output(entry.name, entry.dtype, (len(parts), *entry.shape[1:]), parts)
        changes[entry.name] = (output,)
    return changes


def _merged(matrix: Matrix, sources: Sequence[Span], dtype: str) -> list[Part]:
    """One part per row. A row that copies one expert is a copy of its bytes, no arithmetic."""
    copied = [
        int(row.argmax()) if np.count_nonzero(row) == 1 and row.max() == 1 else None
        for row in matrix
    ]
    mixed = [j for j, source in enumerate(copied) if source is None]
    merge = Merge(matrix[mixed], tuple(sources), dtype)
    return [
        MergedRow(merge, mixed.index(j)) if source is None else sources[source]
        for j, source in enumerate(copied)
    ]


def _sliced(entry: TensorEntry, ids: Sequence[int]) -> Output:
    """The given slices along the first axis, neighbours in one range."""
    parts = []
    start = 0
    for i, index in enumerate(ids):
        if i + 1 == len(ids) or ids[i + 1] != index + 1:
            parts.append(_slices(entry, ids[start], index + 1))
            start = i + 1
    return Output(entry.name, entry.dtype, (len(ids), *entry.shape[1:]), tuple(parts))


def _slices(entry: TensorEntry, first: int, last: int) -> Span:
    row = entry.size // entry.shape[0]
    name = f"{entry.name}[{first}:{last}]"
    return Span(name, entry.path, entry.start + first * row, (last - first) * row)


def _whole(entry: TensorEntry) -> Span:
    return Span(entry.name, entry.path, entry.start, entry.size)
