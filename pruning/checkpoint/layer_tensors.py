"""The tensors of each MoE block, found in the shard headers and checked against the config.

Reads both layouts: one tensor per expert and projection (``experts.3.w1.weight``), and
transformers' fused tensors with the experts along the first axis (``experts.gate_up_proj``).
Quantised checkpoints keep further tensors beside them under any name; those follow their expert.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from liveprune.pruning.architectures import Architecture
from liveprune.pruning.checkpoint.mapping_tensors import check_mapping, mapping_names
from liveprune.pruning.checkpoint.safetensors_io import TensorEntry
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.model_spec import ModelSpec, MoELayer, count_value, read_block

PLAIN_DTYPES = ("F32", "F16", "BF16")
"""Element types in which weights can be added up; anything else is quantised."""
_MATRIX_DTYPES = (*PLAIN_DTYPES, "F64", "F8_E4M3", "F8_E5M2")
"""Element types that are not packed: the shape in the header is the matrix's own."""


@dataclass
class LayerTensors:
    """One MoE block's routed part. Keys are names below ``prefix`` or below the expert."""

    layer: MoELayer
    prefix: str
    gate: dict[str, TensorEntry] = field(default_factory=dict)
    """Tensors with one row per gate row: the gate itself, biases, side tensors."""
    experts: dict[int, dict[str, TensorEntry]] = field(default_factory=dict)
    """Classic layout: expert id -> name below ``experts.ID.`` -> tensor."""
    fused: dict[str, TensorEntry] = field(default_factory=dict)
    """Fused layout: name below ``prefix`` -> tensor with one slice per expert."""
    mapping: dict[str, TensorEntry] = field(default_factory=dict)
    """Ours, beside a gate that keeps the base model's rows (``mapping_tensors``)."""

    def expert_tensors(self) -> Iterator[TensorEntry]:
        """All tensors that hold expert weights."""
        yield from self.fused.values()
        for tensors in self.experts.values():
            yield from tensors.values()

    @property
    def expert_bytes(self) -> int:
        """Bytes of the layer's routed experts."""
        return sum(entry.size for entry in self.expert_tensors())

    def quantised(self, architecture: Architecture) -> str | None:
        """The first tensor that is not a plain weight matrix, or None."""
        plain = {f"{name}.weight" for name in architecture.experts}
        plain |= {architecture.fused_gate_up, architecture.fused_down}
        groups = [self.fused, *self.experts.values()]
        for name, entry in ((n, e) for group in groups for n, e in group.items()):
            if name not in plain or entry.dtype not in PLAIN_DTYPES:
                return entry.name
        return None


def layer_tensors(tensors: Mapping[str, TensorEntry], spec: ModelSpec) -> tuple[LayerTensors, ...]:
    """Group a checkpoint's tensors by MoE layer and check them against its config.

    Raises:
        CheckpointError: a tensor is missing, extra or has another shape or dtype than expected;
            names the tensor, what was found and what was expected.
    """
    found = {
        layer.index: LayerTensors(layer, spec.architecture.block_prefix(layer.index))
        for layer in spec.layers
    }
    for name, entry in tensors.items():
        parts = name.split(".", 3)
        if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[2].isdigit():
            block = found.get(int(parts[2]))
            if block is not None and name.startswith(block.prefix):
                _sort_in(block, name.removeprefix(block.prefix), entry, spec.architecture)
    for block in found.values():
        _check_gate(block, spec)
        check_mapping(block.mapping, block.layer, spec.architecture, spec.hidden_size)
        if block.fused:
            _check_fused(block, spec)
        else:
            _check_experts(block, spec)
    _check_mtp(tensors, spec)
    return tuple(found.values())


def _sort_in(
    block: LayerTensors, name: str, entry: TensorEntry, architecture: Architecture
) -> None:
    gate = architecture.gate.partition(".")[0]
    if name.startswith("experts."):
        expert, _, rest = name.removeprefix("experts.").partition(".")
        if expert.isdigit():
            block.experts.setdefault(int(expert), {})[rest] = entry
        else:
            block.fused[name] = entry
    elif name.startswith(f"{gate}.") or name in architecture.side_tensors:
        block.gate[name] = entry
    elif name in mapping_names(architecture):
        block.mapping[name] = entry


def _check_gate(block: LayerTensors, spec: ModelSpec) -> None:
    width = block.layer.router_width
    for name in (spec.architecture.gate, *spec.architecture.side_tensors):
        if name not in block.gate:
            raise CheckpointError(
                f"{block.prefix}{name}: not found in layer {block.layer.index}; "
                f"expected {width} rows"
            )
    for name, entry in block.gate.items():
        expected = (width, spec.hidden_size) if name == spec.architecture.gate else (width,)
        if entry.shape[: len(expected)] != expected:
            raise CheckpointError(
                f"{entry.name}: shape is {list(entry.shape)}, expected {list(expected)} "
                f"(layer {block.layer.index} routes over {width} experts)"
            )


def _check_experts(block: LayerTensors, spec: ModelSpec) -> None:
    """Classic layout: ids 0..E-1, all with the same tensors as expert 0, of the right shapes."""
    index, count = block.layer.index, block.layer.experts
    extra = sorted(set(block.experts) - set(range(count)))
    if extra:
        raise CheckpointError(
            f"{block.prefix}experts.{extra[0]}: found in layer {index}, "
            f"expected experts 0 to {count - 1} only"
        )
    shapes = _matrix_shapes(spec)
    for expert in range(count):
        tensors = block.experts.get(expert, {})
        for name in spec.architecture.experts:
            if not any(key.startswith(f"{name}.") for key in tensors):
                raise CheckpointError(
                    f"{block.prefix}experts.{expert}.{name}.weight: not found in layer {index}; "
                    f"expected experts 0 to {count - 1}"
                )
        for key, entry in tensors.items():
            _check_matrix(entry, shapes.get(key))
    if not _quantised_one_by_one(spec):
        _check_alike(block)


def _check_alike(block: LayerTensors) -> None:
    """Every expert has the tensors of expert 0, with their dtypes and shapes."""
    model = block.experts[0]
    for expert, tensors in block.experts.items():
        for key in model.keys() | tensors.keys():
            if key not in tensors or key not in model:
                has, misses = (0, expert) if key in model else (expert, 0)
                raise CheckpointError(
                    f"{block.prefix}experts.{misses}.{key}: not found in layer "
                    f"{block.layer.index}, expected it because expert {has} has it"
                )
            entry, like = tensors[key], model[key]
            if (entry.dtype, entry.shape) != (like.dtype, like.shape):
                raise CheckpointError(
                    f"{entry.name}: found {entry.dtype} {list(entry.shape)}, expected "
                    f"{like.dtype} {list(like.shape)} like expert 0"
                )


def _quantised_one_by_one(spec: ModelSpec) -> bool:
    """Whether the quantisation treats single experts differently (ignore lists by index)."""
    text = json.dumps(spec.config.get("quantization_config"))
    return re.search(r"experts[\\.]+\d", text) is not None


def _check_fused(block: LayerTensors, spec: ModelSpec) -> None:
    """Fused layout: every tensor has one slice per expert along its first axis."""
    index, count, names = block.layer.index, block.layer.experts, spec.architecture
    if block.experts:
        raise CheckpointError(
            f"{block.prefix}experts.{min(block.experts)}: found beside fused expert tensors in "
            f"layer {index}, expected one layout"
        )
    hidden, size = spec.hidden_size, spec.expert_size
    shapes = {
        names.fused_gate_up: (count, 2 * size, hidden),
        names.fused_down: (count, hidden, size),
    }
    for name, shape in shapes.items():
        if name not in block.fused:
            raise CheckpointError(f"{block.prefix}{name}: not found, expected {list(shape)}")
        _check_matrix(block.fused[name], shape)
    for entry in block.fused.values():
        if entry.shape[:1] != (count,):
            raise CheckpointError(
                f"{entry.name}: shape is {list(entry.shape)}, expected {count} slices, one for "
                f"each expert of layer {index}"
            )


def _matrix_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    names, hidden, size = spec.architecture.experts, spec.hidden_size, spec.expert_size
    return {
        f"{names.gate}.weight": (size, hidden),
        f"{names.up}.weight": (size, hidden),
        f"{names.down}.weight": (hidden, size),
    }


def _check_matrix(entry: TensorEntry, expected: tuple[int, ...] | None) -> None:
    if expected is not None and entry.dtype in _MATRIX_DTYPES and entry.shape != expected:
        raise CheckpointError(
            f"{entry.name}: shape is {list(entry.shape)}, expected {list(expected)}"
        )


def _check_mtp(tensors: Mapping[str, TensorEntry], spec: ModelSpec) -> None:
    """MTP layers may be absent (many conversions drop them) but not partly there."""
    expected = set(range(mtp_experts(spec)))
    for layer in range(spec.num_hidden_layers, spec.num_hidden_layers + spec.mtp_layers):
        prefix = f"{spec.architecture.block_prefix(layer)}experts."
        names = (name.removeprefix(prefix) for name in tensors if name.startswith(prefix))
        found = {int(name.partition(".")[0]) for name in names if name[:1].isdigit()}
        if found and found != expected:
            wrong = min(found ^ expected)
            raise CheckpointError(
                f"{prefix}{wrong}: {'missing' if wrong in expected else 'extra'}; the "
                f"multi-token-prediction layer {layer} has {len(found)} experts, "
                f"expected {len(expected)}"
            )


def mtp_experts(spec: ModelSpec) -> int:
    """Experts of the multi-token-prediction layers, which plans never touch; 0 without any."""
    if not spec.mtp_layers:
        return 0
    block = read_block(spec.config) or {}
    stated = block.get("mtp_experts")
    return int(stated if stated is not None else count_value(spec.architecture, spec.config))
