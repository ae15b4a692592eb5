"""Writing safetensors files at byte offsets, at the speed of the kernel's own copy."""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from liveprune.pruning.checkpoint.safetensors_io import read_into, tensor_bytes
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.files import sync_file

FLUSH_BYTES = 1 << 26
"""Written bytes after which a shard's pages start their way to the disk."""
COPY_BYTES = 1 << 26
BUFFER_BYTES = 1 << 22

# Reasons for which the kernel declines a copy that plain reads and writes can still do.
_NO_KERNEL_COPY = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
}


@dataclass(frozen=True)
class NewTensor:
    """One tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


def index_json(shards: Mapping[str, Sequence[NewTensor]]) -> bytes:
    """Return the content of ``model.safetensors.index.json`` for shards by file name."""
    weight_map = {t.name: file for file, tensors in shards.items() for t in tensors}
    total = sum(t.size for tensors in shards.values() for t in tensors)
    form = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(form, indent=2) + "\n").encode()


def _header(tensors: Sequence[NewTensor]) -> bytes:
    form: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        form[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size],
        }
        position += tensor.size
    text = json.dumps(form, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class ShardWriter:
    """One safetensors file, filled at byte offsets in any order and from any thread.

    Every ``FLUSH_BYTES`` a background sync is queued on ``flusher``, so that the final sync before
    publication finds little left to do while the copy goes on at the speed of memory. Once
    ``stop`` is set, writes end with ``CancelledError``.
    """

    def __init__(
        self, path: Path, tensors: Sequence[NewTensor], flusher: Executor, stop: threading.Event
    ) -> None:
        self.path = path
        self.offsets: dict[str, int] = {}
        """First byte of each tensor, counted from the start of the file."""
        self.written = 0
        header = _header(tensors)
        position = len(header)
        for tensor in tensors:
            self.offsets[tensor.name] = position
            position += tensor.size
        self._flusher = flusher
        self._stop = stop
        self._lock = threading.Lock()
        self._pending: list[Future[None]] = []
        self._unflushed = 0
        self._kernel_copy = True
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.ftruncate(self._file, position)
            self.write(header, 0)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)
        if error is None:
            self._flush()
            for future in self._pending:
                future.result()

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write ``data`` at byte ``offset`` of the file."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written
            self._count(written)

    def copy(self, source: int, start: int, offset: int, size: int) -> None:
        """Copy ``size`` bytes at ``start`` of the open file ``source`` to byte ``offset``."""
        while size and self._kernel_copy:
            try:
                copied = os.copy_file_range(
                    source, self._file, min(size, COPY_BYTES), start, offset
                )
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                self._kernel_copy = False
                break
            if copied == 0:
                raise CheckpointError(f"{self.path.name}: its source ended {size} bytes too early")
            start, offset, size = start + copied, offset + copied, size - copied
            self._count(copied)
        while size:
            view = memoryview(bytearray(min(size, BUFFER_BYTES)))
            read_into(source, view, start)
            self.write(view, offset)
            start, offset, size = start + len(view), offset + len(view), size - len(view)

    def _count(self, written: int) -> None:
        if self._stop.is_set():
            raise CancelledError
        with self._lock:
            self.written += written
            self._unflushed += written
            if self._unflushed >= FLUSH_BYTES:
                self._flush()

    def _flush(self) -> None:
        self._unflushed = 0
        self._pending.append(self._flusher.submit(sync_file, self.path))
