"""Does a checkpoint hold what its config says: every expert, in its layer, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from liveprune.pruning.checkpoint.fingerprint import fingerprint
from liveprune.pruning.checkpoint.layer_tensors import LayerTensors, layer_tensors
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.model_spec import ModelSpec, read_block

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 24


def verify_checkpoint(model: Path) -> None:
    """Check a base or pruned checkpoint by its headers, and by fingerprints where it has them.

    Reads the router and 12 KiB of each expert, never whole weights.

    Raises:
        CheckpointError: names the tensor or layer, what was found and what was expected.
        ArchitectureError: the family is not supported.
    """
    spec = ModelSpec.from_path(model)
    blocks = layer_tensors(read_checkpoint(model).tensors, spec)
    stated = (read_block(spec.config) or {}).get("fingerprints")
    if stated is not None:
        _check_fingerprints(blocks, {int(k): str(v) for k, v in stated.items()}, spec)


def _check_fingerprints(
    blocks: tuple[LayerTensors, ...], stated: dict[int, str], spec: ModelSpec
) -> None:
    found = {block.layer.index: fingerprint(block, spec.architecture) for block in blocks}
    if stated.keys() != found.keys():
        raise CheckpointError(
            f"config.json: liveprune.fingerprints names the layers {sorted(stated)}, "
            f"expected {sorted(found)}"
        )
    for layer, value in found.items():
        if value == stated[layer]:
            continue
        others = [index for index, other in stated.items() if other == value]
        if others:
            raise CheckpointError(f"layer {layer} holds the weights of layer {others[0]}")
        raise CheckpointError(
            f"layer {layer}: router or experts have fingerprint {value}, expected {stated[layer]}: "
            f"weights were changed, or experts swapped, after the checkpoint was written"
        )


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that holds NaN or infinity; integers and 4-bit floats have neither and pass.

    Takes any floating dtype, 8-bit ones included. One pass, no copy of the tensor: a NaN spreads
    to the minimum and the maximum.

    Raises:
        CheckpointError: naming the tensor and how many elements are not finite.
    """
    import torch

    if not tensor.is_floating_point() or tensor.dtype == torch.float4_e2m1fn_x2:
        return
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        # Reductions have no 8-bit kernels; the chunk bounds what widening costs.
        values = part.float() if part.element_size() == 1 else part
        low, high = torch.aminmax(values)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad = int((~torch.isfinite(values)).sum())
            raise CheckpointError(
                f"{name}: found NaN or infinity in {bad} of {part.numel()} elements, "
                f"expected finite weights"
            )
