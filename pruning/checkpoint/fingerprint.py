"""Short fingerprints, cheap enough to take at every load: of a layer's experts, of a checkpoint.

That of a layer covers the whole router and the first 4096 bytes of every expert matrix in order:
swapped, shifted or foreign layers and experts change it. It does not prove that every byte is
right; file digests do that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from liveprune.pruning.architectures import Architecture
from liveprune.pruning.checkpoint.layer_tensors import LayerTensors
from liveprune.pruning.checkpoint.safetensors_io import TensorEntry, read_checkpoint

HEAD_BYTES = 4096


def fingerprint(block: LayerTensors, architecture: Architecture) -> str:
    """Return the layer's fingerprint, 32 hex digits.

    blake2b over the gate, the other tensors of the router by name, the router map or the tensors
    that stand in its place by name, and for each expert the first 4096 bytes of its gate, up and
    down matrix. Classic and fused layouts of the same weights give the same value.
    """
    state = hashlib.blake2b(digest_size=16)
    for _, entry in sorted(block.gate.items(), key=lambda item: item[0]):
        state.update(entry.read())
    for _, entry in sorted(block.mapping.items(), key=lambda item: item[0]):
        state.update(entry.read())
    for expert in range(block.layer.experts):
        for entry, start, size in _matrices(block, expert, architecture):
            state.update(entry.read(start, min(size, HEAD_BYTES)))
    return state.hexdigest()


def fingerprint_model(model: Path) -> str:
    """Return one fingerprint of a whole checkpoint, 32 hex digits.

    blake2b over the config and, of each tensor, the name, dtype, shape and first 4096 bytes. Tells
    models apart in practice, fine-tunes of one base included, without reading all bytes; it is no
    protection against forgery.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    entries = read_checkpoint(model).tensors
    state = hashlib.blake2b((model / "config.json").read_bytes(), digest_size=16)
    for name, entry in sorted(entries.items()):
        state.update(f"{name}{entry.dtype}{entry.shape}".encode())
        state.update(entry.read(0, min(entry.size, HEAD_BYTES)))
    return state.hexdigest()


def _matrices(
    block: LayerTensors, expert: int, architecture: Architecture
) -> Iterator[tuple[TensorEntry, int, int]]:
    """(tensor, first byte, bytes) of the gate, up and down matrix of one expert."""
    if not block.fused:
        for name in architecture.experts:
            entry = _main_tensor(block.experts[expert], f"{name}.")
            yield entry, 0, entry.size
        return
    gate_up = block.fused[architecture.fused_gate_up]
    half = gate_up.size // block.layer.experts // 2
    yield gate_up, (2 * expert) * half, half
    yield gate_up, (2 * expert + 1) * half, half
    down = block.fused[architecture.fused_down]
    size = down.size // block.layer.experts
    yield down, expert * size, size


def _main_tensor(tensors: Mapping[str, TensorEntry], prefix: str) -> TensorEntry:
    """The weight of one projection; in packed formats, which name it freely, its largest tensor."""
    plain = tensors.get(f"{prefix}weight")
    if plain is not None:
        return plain
    named = [tensors[key] for key in sorted(tensors) if key.startswith(prefix)]
    return max(named, key=lambda entry: entry.size)
