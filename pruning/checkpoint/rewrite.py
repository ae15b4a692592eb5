"""What a plan makes of a checkpoint's tensors: new names and shapes, and where the bytes are.

Pure bookkeeping: nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from liveprune.pruning.architectures import Architecture
from liveprune.pruning.checkpoint.layer_tensors import LayerTensors
from liveprune.pruning.checkpoint.mapping_tensors import mapping_values
from liveprune.pruning.checkpoint.merge import Merge, Span
from liveprune.pruning.checkpoint.neuron_merge import NeuronMerge
from liveprune.pruning.checkpoint.safetensors_io import TensorEntry
from liveprune.pruning.checkpoint.shard_writer import NewTensor
from liveprune.pruning.neuron_sources import only_source
from liveprune.pruning.plan import LayerPlan, Plan


@dataclass(frozen=True, eq=False)
class MergedRow:
    """Row ``row`` of ``merge``; a merge neuron by neuron has one."""

    merge: Merge | NeuronMerge
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
            experts = _fused if block.fused else _classic
            changes.update(experts(block, layer, architecture))
    return changes


def _gate(
    block: LayerTensors, layer: LayerPlan, architecture: Architecture
) -> dict[str, tuple[Output, ...]]:
    """Slice the router to the kept ids, or keep it whole beside the new mapping."""
    values = mapping_values(layer, architecture)
    if not values:
        return {entry.name: (_sliced(entry, layer.kept),) for entry in block.gate.values()}
    gate = block.gate[architecture.gate]
    mapping = [
        Output(
            f"{block.prefix}{name}",
            "I32" if value.dtype == np.int32 else "F32",
            value.shape,
            (Literal(value.tobytes()),),
        )
        for name, value in values.items()
    ]
    return {gate.name: (unchanged(gate), *mapping)}


def _classic(
    block: LayerTensors, layer: LayerPlan, architecture: Architecture
) -> dict[str, tuple[Output, ...]]:
    """New expert j stands in the place of the one it continues: kept id j, or old expert j."""
    changes: dict[str, tuple[Output, ...]] = {entry.name: () for entry in block.expert_tensors()}
    homes = layer.kept or tuple(range(layer.kept_experts))
    merged = {}
    if layer.merges:
        for key, entry in block.experts[0].items():
            sources = [_whole(block.experts[i][key]) for i in range(layer.experts)]
            by_column = key == f"{architecture.experts.down}.weight"
            merged[key] = _merged(layer, sources, entry.dtype, entry.shape[0], by_column=by_column)
    for new, home in enumerate(homes):
        for key, entry in block.experts[home].items():
            name = f"{block.prefix}experts.{new}.{key}"
            part = merged[key][new] if merged else _whole(entry)
            changes[entry.name] = (Output(name, entry.dtype, entry.shape, (part,)),)
    return changes


def _fused(
    block: LayerTensors, layer: LayerPlan, architecture: Architecture
) -> dict[str, tuple[Output, ...]]:
    changes: dict[str, tuple[Output, ...]] = {}
    for key, entry in block.fused.items():
        if not layer.merges:
            output = _sliced(entry, layer.kept)
        else:
            parts = _fused_parts(entry, layer, 2 if key == architecture.fused_gate_up else 1)
            output = Output(entry.name, entry.dtype, (layer.kept_experts, *entry.shape[1:]), parts)
        changes[entry.name] = (output,)
    return changes


def _fused_parts(entry: TensorEntry, layer: LayerPlan, halves: int) -> tuple[Part, ...]:
    """Expert by expert; each has its gate and its up matrix, or the down matrix alone."""
    slices = [_slices(entry, i, i + 1) for i in range(layer.experts)]
    rows = entry.shape[1] // halves
    merged = []
    for half in range(halves):
        sources = [
            replace(x, start=x.start + half * x.size // halves, size=x.size // halves)
            for x in slices
        ]
        merged.append(_merged(layer, sources, entry.dtype, rows, by_column=halves == 1))
    return tuple(part for expert in zip(*merged, strict=True) for part in expert)


def _merged(
    layer: LayerPlan, sources: Sequence[Span], dtype: str, rows: int, *, by_column: bool
) -> list[Part]:
    """One part per new expert. What continues one expert copies its bytes, no arithmetic."""
    if layer.merge is None:
        copied = [only_source(layer, j) for j in range(layer.kept_experts)]
        spans = tuple(sources)
        return [
            MergedRow(NeuronMerge(layer, j, spans, rows, by_column, dtype), 0)
            if source is None
            else sources[source]
            for j, source in enumerate(copied)
        ]
    copied = [
        int(row.argmax()) if np.count_nonzero(row) == 1 and row.max() == 1 else None
        for row in layer.merge
    ]
    mixed = [j for j, source in enumerate(copied) if source is None]
    merge = Merge(layer.merge[mixed], tuple(sources), dtype)
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
