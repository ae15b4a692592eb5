"""The pages of elastic memory in the process's own memory."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from liveprune.patches.page_counts import Region, Runs, joined
from liveprune.pruning.errors import EngineError

HUGE_PAGE = 2 << 20
MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.13 on.


class CpuPages:
    """Private memory that the system backs on first write.

    A huge page (2 MiB; three times faster to fill) is used only where one row holds all of it.
    Anywhere else, writing one row would make its neighbours' bytes resident too, and khugepaged,
    which by default makes a huge page of any with one small page in use, would bring back what
    was released.
    """

    page_bytes = mmap.PAGESIZE

    def __init__(self, size: int, rows: int, regions: Sequence[Region]) -> None:
        self._size = size
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            self._mmap = mmap.mmap(-1, size + 2 * HUGE_PAGE, flags=flags)
        except OSError as error:
            raise EngineError(f"elastic memory: no addresses for {size} bytes: {error}") from error
        self._start = -torch.frombuffer(self._mmap, dtype=torch.int8).data_ptr() % HUGE_PAGE
        with contextlib.suppress(OSError):  # a kernel without huge pages has small ones anyway
            self._mmap.madvise(mmap.MADV_NOHUGEPAGE)
            for start, stop in _huge_pages(rows, regions):
                at = self._start + start * HUGE_PAGE
                self._mmap.madvise(mmap.MADV_HUGEPAGE, at, (stop - start) * HUGE_PAGE)

    def tensor(self) -> torch.Tensor:
        # The tensor's storage refers to the mmap object, which unmaps itself when it is collected.
        return torch.frombuffer(self._mmap, dtype=torch.int8, count=self._size, offset=self._start)

    def map(self, runs: Runs) -> None:
        """Nothing to do: pages appear, as zeros, when they are written."""

    def unmap(self, runs: Runs) -> None:
        for start, stop in runs:
            at = self._start + start * self.page_bytes
            try:
                self._mmap.madvise(mmap.MADV_DONTNEED, at, (stop - start) * self.page_bytes)
            except OSError as error:  # locked into memory, for one
                raise EngineError(f"elastic memory: cannot release pages: {error}") from error


def _huge_pages(rows: int, regions: Sequence[Region]) -> Runs:
    """The huge pages that lie within one row; none if they cost too many map entries."""
    runs: Runs = []
    for region in regions:
        if region.extent < HUGE_PAGE:
            continue
        start = region.offset + np.arange(rows, dtype=np.int64) * region.stride
        first, stop = -(-start // HUGE_PAGE), (start + region.extent) // HUGE_PAGE
        runs += [(int(a), int(b)) for a, b in zip(first, stop, strict=True) if a < b]
    runs = joined(runs)
    # Each run takes two entries of a table that the whole process shares and must not fill.
    return runs if 2 * len(runs) <= _spare_map_entries() else []


def _spare_map_entries() -> int:
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
        used = Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0
    return limit // 2 - used
