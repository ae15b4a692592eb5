"""Safetensors files by byte range: headers are parsed, tensors stay on disk.

The format (huggingface/safetensors, README "Format"): eight bytes of header length, a JSON header
naming dtype, shape and offsets, then the tensors' bytes. Nothing here maps a file into memory:
pages of a mapping count as resident memory, and a checkpoint is larger than that.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER = 100_000_000
"""Longest header that the reference implementation accepts."""

_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header states it."""

    name: str
    dtype: str
    """Safetensors name, e.g. ``BF16``."""
    shape: tuple[int, ...]
    path: Path
    start: int
    """First byte, counted from the start of the file."""
    size: int
    """Bytes."""

    def read(self, start: int = 0, size: int | None = None) -> bytes:
        """Return ``size`` bytes from byte ``start`` of the tensor (all that follow: None)."""
        with self.path.open("rb") as file:
            data = bytearray(self.size - start if size is None else size)
            read_into(file.fileno(), memoryview(data), self.start + start)
            return bytes(data)


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a model folder and what their headers hold."""

    shards: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    """By name; shard after shard, in the order of the bytes."""

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.tensors.values())


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. ``dtype`` is a safetensors name."""
    return math.prod(shape) * _BITS[dtype] // 8


def item_bits(dtype: str) -> int:
    """Bits of one element."""
    return _BITS[dtype]


def read_checkpoint(model: Path) -> Checkpoint:
    """Read every header of a model folder (an index and its shards, or one file).

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, or the index contradicts it.
    """
    index = model / INDEX_NAME
    if index.exists():
        weight_map = _read_index(index)
        names = sorted(set(weight_map.values()))
    elif (model / SINGLE_NAME).exists():
        weight_map, names = {}, [SINGLE_NAME]
    else:
        raise CheckpointError(f"{model}: found no weights, expected {SINGLE_NAME} or {INDEX_NAME}")
    tensors: dict[str, TensorEntry] = {}
    for name in names:
        if not (model / name).exists():
            count = sum(file == name for file in weight_map.values())
            raise CheckpointError(
                f"{model / name}: not found; {INDEX_NAME} places {count} tensors in it"
            )
        for entry in read_header(model / name):
            if entry.name in tensors:
                raise CheckpointError(
                    f"{entry.name}: found in {name} and in {tensors[entry.name].path.name}, "
                    f"expected one of them"
                )
            tensors[entry.name] = entry
    for tensor, file in weight_map.items():
        if tensor not in tensors or tensors[tensor].path.name != file:
            raise CheckpointError(
                f"{model / file}: misses {tensor}, which {INDEX_NAME} places there"
            )
    return Checkpoint(tuple(model / name for name in names), tensors)


def read_header(path: Path) -> list[TensorEntry]:
    """Return the tensors of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the file is not a whole, well-formed safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            head = file.read(8)
            header_size = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 2 <= header_size <= min(MAX_HEADER, length - 8):
                raise CheckpointError(
                    f"{path}: states a header of {header_size} bytes in a file of {length}; "
                    f"expected a whole safetensors file (truncated or corrupt)"
                )
            header = json.loads(file.read(header_size))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: header not readable: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is not a JSON object")
    header.pop("__metadata__", None)
    base = 8 + header_size
    entries = [_entry(path, name, item, base) for name, item in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.size))
    _check_contiguous(path, entries, base, length)
    return entries


def _entry(path: Path, name: str, item: Any, base: int) -> TensorEntry:
    where = f"{path}: {name}"
    try:
        dtype, shape, (start, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: malformed header entry {item!r}") from error
    if dtype not in _BITS:
        raise CheckpointError(f"{where}: dtype is {dtype!r}, expected one of {', '.join(_BITS)}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
        raise CheckpointError(f"{where}: malformed header entry {item!r}")
    expected = tensor_bytes(dtype, shape)
    if end - start != expected:
        raise CheckpointError(
            f"{where}: holds {end - start} bytes, expected {expected} for {dtype} {list(shape)}"
        )
    return TensorEntry(name, dtype, shape, path, base + start, expected)


def _check_contiguous(path: Path, entries: list[TensorEntry], base: int, length: int) -> None:
    position = base
    for entry in entries:
        if entry.start != position:
            raise CheckpointError(
                f"{path}: {entry.name} starts at byte {entry.start}, expected {position} "
                f"(a hole or an overlap)"
            )
        position += entry.size
    if position != length:
        raise CheckpointError(
            f"{path}: file has {length} bytes, expected {position} by its header "
            f"({'truncated' if length < position else 'trailing bytes'})"
        )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(Path(file).name == file for file in set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not readable as an index: {error}") from error
    if not weight_map or not plain:
        raise CheckpointError(f"{path}: weight_map must map tensors to file names in this folder")
    return dict(weight_map)


def read_into(source: int, view: memoryview, start: int) -> None:
    """Fill ``view`` from byte ``start`` of the open file ``source``.

    Raises:
        CheckpointError: the file ends before that.
    """
    while view:
        count = os.preadv(source, [view], start)
        if count == 0:
            raise CheckpointError(f"weight file ended at byte {start}, expected {len(view)} more")
        view, start = view[count:], start + count
