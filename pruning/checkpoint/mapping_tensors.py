"""The tensors beside a gate that keeps the base model's rows, and what they may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from liveprune.pruning.architectures import Architecture
from liveprune.pruning.checkpoint.safetensors_io import TensorEntry
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.model_spec import MAPPINGS, MoELayer
from liveprune.pruning.plan import LayerPlan


@dataclass(frozen=True)
class Header:
    """Dtype and shape of a tensor, as a safetensors header states them."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def mapping_names(architecture: Architecture) -> tuple[str, ...]:
    """All names below the block that such tensors can have."""
    return (architecture.router_map, architecture.expert_map, architecture.constants)


def mapping_headers(
    layer: MoELayer, architecture: Architecture, hidden_size: int
) -> dict[str, Header]:
    """What the layer has, by name below its block; nothing without a mapping."""
    router_map, expert_map, constants = mapping_names(architecture)
    width = layer.router_width
    if layer.mapping == "router_map":
        return {router_map: Header("F32", (layer.experts, width))}
    if layer.mapping == "expert_map":
        return {expert_map: Header("I32", (width,))}
    if layer.mapping == "constants":
        rows = (width - layer.experts, hidden_size)
        return {expert_map: Header("I32", (width,)), constants: Header("F32", rows)}
    return {}


def mapping_values(
    layer: LayerPlan, architecture: Architecture
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32 | np.int32]]]:
    """What a plan's layer writes, little-endian; the counterpart of ``mapping_headers``."""
    router_map, expert_map, constants = mapping_names(architecture)
    if layer.router_map is not None:
        return {router_map: np.asarray(layer.router_map, dtype="<f4")}
    if not layer.mapping:
        return {}
    values = {expert_map: np.asarray(layer.new_ids, dtype="<i4")}
    if layer.constants is not None:
        values[constants] = np.asarray(layer.constants, dtype="<f4")
    return values


def check_mapping(
    found: Mapping[str, TensorEntry],
    layer: MoELayer,
    architecture: Architecture,
    hidden_size: int,
) -> None:
    """Refuse what is missing, extra or mis-shaped, by the headers, and ids that name no expert.

    Args:
        found: such tensors of the layer, by name below its block.
        layer: what the config says of it.
        architecture: names the tensors.
        hidden_size: length of a constant vector.

    Raises:
        CheckpointError: names the tensor, what was found and what was expected.
    """
    prefix = architecture.block_prefix(layer.index)
    expected = mapping_headers(layer, architecture, hidden_size)
    for name in mapping_names(architecture):
        entry, header = found.get(name), expected.get(name)
        if entry is None and header is not None:
            raise CheckpointError(
                f"{prefix}{name}: not found; layer {layer.index} has {layer.router_width} gate "
                f"rows for {layer.experts} experts, expected {header}"
            )
        if entry is not None and header is None:
            raise CheckpointError(f"{entry.name}: found; expected none, {_stated(layer)}")
        if entry is not None and header is not None:
            actual = Header(entry.dtype, tuple(entry.shape))
            if actual != header:
                raise CheckpointError(f"{entry.name}: found {actual}, expected {header}")
    if architecture.expert_map in expected:
        _check_expert_map(found[architecture.expert_map], layer)


def check_finite_mapping(found: Mapping[str, TensorEntry]) -> None:
    """Refuse router maps and constants that hold NaN or infinity; reads them whole.

    Raises:
        CheckpointError: names the tensor.
    """
    for entry in found.values():
        if entry.dtype == "F32":
            bad = ~np.isfinite(np.frombuffer(entry.read(), dtype="<f4"))
            if bad.any():
                raise CheckpointError(
                    f"{entry.name}: found NaN or infinity in {bad.sum()} of {bad.size} elements, "
                    f"expected finite values"
                )


def _stated(layer: MoELayer) -> str:
    if layer.mapping:
        return f"the config states {MAPPINGS[layer.mapping]} for layer {layer.index}"
    return f"the config states no router_width for layer {layer.index}"


def _check_expert_map(entry: TensorEntry, layer: MoELayer) -> None:
    """Every new expert does some work; constants do the rest, each kept expert its own."""
    ids = np.frombuffer(entry.read(), dtype="<i4").tolist()
    if layer.mapping == "constants":
        kept = [i for i in ids if i >= 0]
        fits = kept == list(range(layer.experts)) and set(ids) <= {-1, *kept}
        expected = f"each of 0 to {layer.experts - 1} once, ascending, and -1"
    else:
        fits = sorted(set(ids)) == list(range(layer.experts))
        expected = f"each of 0 to {layer.experts - 1}"
    if not fits:
        raise CheckpointError(f"{entry.name}: found {ids}, expected {expected}")
