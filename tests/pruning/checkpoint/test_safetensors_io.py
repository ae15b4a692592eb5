"""The reader and the writer agree with the safetensors library, and refuse what it refuses."""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from liveprune.pruning.checkpoint import shard_writer
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint, read_header, tensor_bytes
from liveprune.pruning.checkpoint.shard_writer import NewTensor, ShardWriter
from liveprune.pruning.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.int64).view(2, 3),
    "b.weight": torch.randn(4, 5).bfloat16(),
    "c": torch.tensor(3.0),
    "d": torch.randn(7).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_reads_what_the_library_wrote(file: Path) -> None:
    entries = {entry.name: entry for entry in read_header(file)}
    assert entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert entries[name].shape == tuple(tensor.shape)
        assert entries[name].read() == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    assert entries["a"].dtype == "I64"
    assert entries["a"].read(8, 16) == struct.pack("<QQ", 1, 2)


@pytest.mark.parametrize("kernel_copy", [True, False])
def test_writes_what_the_library_would(
    kernel_copy: bool, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> int:
        raise OSError(errno.EXDEV, "other disk")

    if not kernel_copy:
        monkeypatch.setattr(shard_writer.os, "copy_file_range", refuse)
        monkeypatch.setattr(shard_writer, "BUFFER_BYTES", 7)
    monkeypatch.setattr(shard_writer, "FLUSH_BYTES", 10)
    entries = read_header(file)
    tensors = [NewTensor(x.name, x.dtype, x.shape) for x in entries]
    source = os.open(file, os.O_RDONLY)
    with (
        ThreadPoolExecutor(1) as flusher,
        ShardWriter(tmp_path / "out", tensors, flusher, threading.Event()) as writer,
    ):
        for entry in reversed(entries):  # Any order.
            writer.copy(source, entry.start, writer.offsets[entry.name], entry.size)
    os.close(source)
    assert (tmp_path / "out").read_bytes() == file.read_bytes()
    assert writer.written == file.stat().st_size
    assert torch.equal(load_file(tmp_path / "out")["a"], TENSORS["a"])


def test_a_stopped_writer_writes_no_more(tmp_path: Path) -> None:
    stop = threading.Event()
    tensors = [NewTensor("a", "U8", (4,))]
    with ThreadPoolExecutor(1) as flusher:
        writer = ShardWriter(tmp_path / "out", tensors, flusher, stop)
        stop.set()
        with pytest.raises(CancelledError), writer:
            writer.write(b"abcd", writer.offsets["a"])


def test_a_source_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    source = os.open(tmp_path / "short", os.O_RDONLY)
    tensors = [NewTensor("a", "U8", (8,))]
    with (
        ThreadPoolExecutor(1) as flusher,
        pytest.raises(CheckpointError, match="ended 5 bytes too early"),
        ShardWriter(tmp_path / "out", tensors, flusher, threading.Event()) as writer,
    ):
        writer.copy(source, 0, writer.offsets["a"], 8)
    os.close(source)


def entry(start: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - start] if shape is None else shape,
        "data_offsets": [start, end],
    }


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"a": entry(0, 4)}, b"abc", r"bytes, expected .*truncated"),
        ({"a": entry(0, 4)}, b"abcde", "trailing bytes"),
        ({"a": entry(0, 2), "b": entry(3, 4)}, b"abcd", "b starts at byte .*a hole"),
        ({"a": entry(0, 2), "b": entry(1, 4)}, b"abcd", "b starts at byte .* overlap"),
        ({"a": entry(0, 4, "Q3")}, b"abcd", "a: dtype is 'Q3', expected one of"),
        ({"a": entry(0, 4, "F32", [2])}, b"abcd", r"a: holds 4 bytes, expected 8 for F32 \[2\]"),
        ({"a": entry(0, 4, "U8", [-4])}, b"abcd", "a: malformed header entry"),
        ({"a": {"dtype": "U8"}}, b"", "a: malformed header entry"),
        ({"a": 3}, b"", "a: malformed header entry"),
        ([1], b"", "not a JSON object"),
        (b"{not json", b"", "header not readable"),
        (b"\xff\xfe", b"", "header not readable"),
    ],
)
def test_malformed_files(header: Any, data: bytes, match: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_header(write(tmp_path / "x.safetensors", header, data))


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(CheckpointError, match="states a header of 1099511627776 bytes"):
        read_header(tmp_path / "x")


def index(folder: Path, weight_map: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": "model.safetensors", "z": "model.safetensors"}, "misses z, which"),
        ({"a": "../model.safetensors"}, "file names in this folder"),
        ({"a": 3}, "not readable as an index"),
        ([], "not readable as an index"),
        ({}, "file names in this folder"),
        ({"a": "other.safetensors"}, r"other.safetensors: not found; .* places 1 tensors"),
    ],
)
def test_indexes_that_contradict_the_files(weight_map: Any, match: str, file: Path) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_checkpoint(index(file.parent, weight_map))


def test_a_tensor_in_two_shards(file: Path) -> None:
    save_file({"a": TENSORS["a"]}, file.parent / "two.safetensors")
    folder = index(file.parent, {"a": "two.safetensors", "c": "model.safetensors"})
    with pytest.raises(CheckpointError, match=r"a: found in two.* and in model"):
        read_checkpoint(folder)


def test_four_bit_elements() -> None:
    assert tensor_bytes("F4", (3, 4)) == 6
    assert tensor_bytes("BF16", ()) == 2
