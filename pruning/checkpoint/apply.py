"""Plan -> checkpoint, streaming: weights pass through as ranges of bytes and are never held.

Kept experts are renumbered 0..E'-1 in ascending original order; gate rows and the router's other
tensors are cut to match, or stay whole beside a mapping; merged experts are computed a chunk of
elements, or one matrix, at a time; all else is copied byte for byte. The folder appears whole or
not at all.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from liveprune.pruning.checkpoint.apply_config import apply_config
from liveprune.pruning.checkpoint.base_files import base_files
from liveprune.pruning.checkpoint.fingerprint import fingerprint
from liveprune.pruning.checkpoint.layer_tensors import LayerTensors, layer_tensors
from liveprune.pruning.checkpoint.model_card import model_card
from liveprune.pruning.checkpoint.rewrite import Output, rewrite, unchanged
from liveprune.pruning.checkpoint.safetensors_io import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    item_bits,
    read_checkpoint,
)
from liveprune.pruning.checkpoint.shard_writer import index_json
from liveprune.pruning.checkpoint.write_shards import Progress, write_shards
from liveprune.pruning.errors import CheckpointError, PlanError
from liveprune.pruning.files import new_folder, write_atomic
from liveprune.pruning.model_name import model_name
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_guards import check_plan
from liveprune.pruning.plan_io import CHECKPOINT_PLAN, save_plan

_SPARE_BYTES = 1 << 20
"""Room for headers, config, index and card."""


def apply_plan(model: Path, plan: Plan, output: Path, *, progress: Progress | None = None) -> None:
    """Write the checkpoint that ``plan`` makes of ``model`` to the new folder ``output``.

    Keeps the layout (classic or fused) and the shards of ``model``; a shard left empty disappears.
    Holds buffers of tens of MiB, whatever the size of the model, and under a neuron map, on each
    thread, one matrix of one expert in float32. Copies and merges run on a few threads,
    ``progress`` is called on this one with (bytes written, bytes in all).

    Raises:
        PlanError: the plan does not fit, or would merge quantised experts.
        CheckpointError: the model's files are damaged or contradict its config, merged weights
            are not finite, there is no room, or writing failed.
        ArchitectureError: the family is not supported.
        FileExistsError: ``output`` exists and is not an empty folder.
    """
    spec = ModelSpec.from_path(model)
    check_plan(plan, spec)
    plan = dataclasses.replace(plan, base_model=model_name(plan.base_model or model))
    after = ModelSpec.from_config(apply_config(spec.config, plan, spec))
    checkpoint = read_checkpoint(model)
    blocks = layer_tensors(checkpoint.tensors, spec)
    _refuse_quantised_merges(blocks, plan, spec)
    shards = _shards(checkpoint, rewrite(blocks, plan, spec.architecture))
    files = base_files(model)
    total = sum(tensor.size for tensors in shards.values() for tensor in tensors)
    _check_space(output, total + sum(file.stat().st_size for file in files.values()))
    with new_folder(output) as folder:
        try:
            write_shards(folder, shards, checkpoint.shards, progress)
            for name, file in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, folder / name)
            if len(shards) > 1:
                write_atomic(folder / INDEX_NAME, index_json(shards))
            save_plan(plan, folder / CHECKPOINT_PLAN)
            prints = _fingerprints(folder, after)
            config = apply_config(spec.config, plan, spec, fingerprints=prints)
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            write_atomic(folder / "config.json", text.encode())
            write_atomic(folder / "README.md", model_card(model, plan, after).encode())
        except OSError as error:
            raise CheckpointError(f"{output}: not written: {error}") from error


def _fingerprints(folder: Path, spec: ModelSpec) -> dict[int, str]:
    """Of what was in fact written, after checking it against the new config."""
    blocks = layer_tensors(read_checkpoint(folder).tensors, spec)
    return {block.layer.index: fingerprint(block, spec.architecture) for block in blocks}


def _refuse_quantised_merges(blocks: Sequence[LayerTensors], plan: Plan, spec: ModelSpec) -> None:
    for block in blocks:
        quantised = block.quantised(spec.architecture)
        if quantised and plan.layer(block.layer.index).merges:
            raise PlanError(
                f"layer {block.layer.index}: the plan merges experts, but {quantised} is "
                f"quantised; expected bfloat16, float16 or float32 weights, or a plan that only "
                f"prunes"
            )


def _shards(
    checkpoint: Checkpoint, changes: Mapping[str, tuple[Output, ...]]
) -> dict[str, list[Output]]:
    """The new tensors by file name, in the shards of the base model; empty ones disappear."""
    shards: dict[Path, list[Output]] = {path: [] for path in checkpoint.shards}
    for name, entry in checkpoint.tensors.items():
        shards[entry.path].extend(changes.get(name, (unchanged(entry),)))
    groups = [outputs for outputs in shards.values() if outputs]
    for outputs in groups:
        # Wide elements first, as safetensors' own writer does, keeps every tensor aligned.
        outputs.sort(key=lambda tensor: -item_bits(tensor.dtype))
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _check_space(output: Path, size: int) -> None:
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < size + _SPARE_BYTES:
        raise CheckpointError(
            f"{output}: {size:,} bytes to write, found {free:,} free on the disk of {parent}"
        )
