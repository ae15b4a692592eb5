"""Does a checkpoint hold what its config says: every expert, in its layer, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from liveprune.pruning.checkpoint.fingerprint import fingerprint
from liveprune.pruning.checkpoint.layer_tensors import LayerTensors, layer_tensors
from liveprune.pruning.checkpoint.mapping_tensors import check_finite_mapping
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.model_spec import ModelSpec, read_block
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_io import CHECKPOINT_PLAN, load_plan

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 24


def verify_checkpoint(model: Path) -> None:
    """Check a base or pruned checkpoint by its headers, and by fingerprints where it has them.

    Reads the router with its mapping and 12 KiB of each expert, never whole weights.

    Raises:
        CheckpointError: names the tensor or layer, what was found and what was expected.
        PlanError: the plan kept beside a pruned checkpoint is damaged.
        ArchitectureError: the family is not supported.
    """
    spec = ModelSpec.from_path(model)
    if (model / CHECKPOINT_PLAN).exists():
        _check_plan(load_plan(model), spec)
    blocks = layer_tensors(read_checkpoint(model).tensors, spec)
    for block in blocks:
        check_finite_mapping(block.mapping)
    stated = (read_block(spec.config) or {}).get("fingerprints")
    if stated is not None:
        _check_fingerprints(blocks, {int(k): str(v) for k, v in stated.items()}, spec)


def _check_plan(plan: Plan, spec: ModelSpec) -> None:
    """The config says what the plan kept beside it says."""
    stated = (read_block(spec.config) or {}).get("plan", plan.digest)
    if stated != plan.digest:
        raise CheckpointError(
            f"config.json: liveprune.plan is {stated}, expected {plan.digest} as in "
            f"{CHECKPOINT_PLAN}"
        )
    found = {layer.index: (layer.experts, layer.top_k) for layer in spec.layers}
    expected = {layer.layer: (layer.kept_experts, layer.top_k) for layer in plan.layers}
    for index in sorted(found.keys() | expected.keys()):
        if found.get(index) != expected.get(index):
            raise CheckpointError(
                f"config.json: layer {index} has (experts, top-k) {found.get(index)}, expected "
                f"{expected.get(index)} as in {CHECKPOINT_PLAN}"
            )
    for layer, base in zip(plan.layers, spec.layers, strict=True):
        # One that changes nothing leaves the mapping of the model it was applied to.
        if layer.mapping != base.mapping and not layer.is_identity:
            raise CheckpointError(
                f"config.json: layer {base.index} has the mapping {base.mapping or 'none'}, "
                f"expected {layer.mapping or 'none'} as in {CHECKPOINT_PLAN}"
            )


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
