"""Memory whose addresses never change while the pages behind it come and go.

Expert rows and the KV cache live in it. A page has memory if and only if a committed row touches
it: rows lie back to back, so two may share one, which then stays until both are released.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from liveprune.patches.cpu_memory import CpuPages
from liveprune.patches.page_counts import PageCounts, Region, Runs, joined
from liveprune.pruning.errors import EngineError


class Pages(Protocol):
    """A range of addresses, and the calls that give its pages memory or take it back."""

    page_bytes: int

    def tensor(self) -> torch.Tensor:
        """The range, int8 [bytes]; the addresses live as long as any view of it."""

    def map(self, runs: Runs) -> None:
        """Give free pages memory, zeroed: all of them, or EngineError and none."""

    def unmap(self, runs: Runs) -> None:
        """Take their memory back."""


class ElasticTensor:
    """A tensor whose rows have memory only while they are committed.

    Not for several threads at once.
    """

    def __init__(
        self, tensor: torch.Tensor, rows: int, regions: Sequence[Region], pages: Pages
    ) -> None:
        """``tensor`` is a view of ``pages.tensor()``; ``regions`` say where its rows lie."""
        self.tensor = tensor
        self._regions = tuple(regions)
        self._pages = pages
        self._committed = np.zeros(rows, np.bool_)
        end = max(x.offset + (rows - 1) * x.stride + x.extent for x in self._regions)
        self._counts = PageCounts(-(-end // pages.page_bytes))

    @property
    def page_bytes(self) -> int:
        return self._pages.page_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of all pages that a committed row touches; on CPU unwritten ones take no memory."""
        return self._counts.occupied * self.page_bytes

    def commit(self, rows: Iterable[int]) -> None:
        """Give rows memory; rows that have it are left as they are.

        What a row holds is undefined until it is written: pages that were free are zeros, but one
        shared with another row kept what was in it.

        Raises:
            EngineError: no such row, or no memory; then nothing has changed.
        """
        fresh = self._chosen(rows, committed=False)
        runs = self._count(fresh, self._counts.add)
        try:
            self._pages.map(runs)
        except EngineError:
            self._count(fresh, self._counts.remove)
            raise
        self._committed[fresh] = True

    def release(self, rows: Iterable[int]) -> int:
        """Take the memory of rows; returns the bytes of the pages that no row needs any more.

        On CPU pages that were never written count too, though they had none.

        Raises:
            EngineError: no such row.
        """
        gone = self._chosen(rows, committed=True)
        runs = self._count(gone, self._counts.remove)
        self._committed[gone] = False
        self._pages.unmap(runs)
        return sum(stop - start for start, stop in runs) * self.page_bytes

    def _chosen(self, rows: Iterable[int], *, committed: bool) -> NDArray[np.int64]:
        chosen: NDArray[np.int64] = np.unique(np.fromiter(rows, np.int64))
        if len(chosen) and (chosen[0] < 0 or chosen[-1] >= len(self._committed)):
            raise EngineError(
                f"elastic memory: found rows {chosen[0]} to {chosen[-1]}, "
                f"expected rows within 0 to {len(self._committed) - 1}"
            )
        wanted: NDArray[np.int64] = chosen[self._committed[chosen] == committed]
        return wanted

    def _count(
        self,
        rows: NDArray[np.int64],
        change: Callable[[NDArray[np.int64], NDArray[np.int64]], Runs],
    ) -> Runs:
        if not len(rows):
            return []
        runs: Runs = []
        for region in self._regions:
            start = region.offset + rows * region.stride
            last = start + region.extent - 1
            runs += change(start // self.page_bytes, last // self.page_bytes)
        return joined(runs)


def elastic_tensor(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
) -> ElasticTensor:
    """A contiguous tensor of ``shape`` [rows, ...], none of its rows committed.

    On CPU all of it can be read, as zeros, and a write takes memory whether committed or not; on
    CUDA touching a row that is not committed is an illegal access.

    Raises:
        EngineError: an empty shape, a device without such memory, or no addresses left.
    """
    rows, row_bytes = shape[0], math.prod(shape[1:]) * dtype.itemsize
    regions = [Region(0, row_bytes, row_bytes)]
    pages = _pages(rows * row_bytes, rows, regions, torch.device(device))
    return ElasticTensor(pages.tensor().view(dtype).view(tuple(shape)), rows, regions, pages)


def elastic_bytes(
    size: int, rows: int, regions: Sequence[Region], device: torch.device | str
) -> ElasticTensor:
    """The same for rows that lie in several places: the tensor is int8 [size].

    Raises:
        EngineError: see ``elastic_tensor``.
    """
    pages = _pages(size, rows, regions, torch.device(device))
    return ElasticTensor(pages.tensor(), rows, regions, pages)


def _pages(size: int, rows: int, regions: Sequence[Region], device: torch.device) -> Pages:
    if size <= 0:
        raise EngineError(f"elastic memory: found {size} bytes, expected at least one")
    if device.type == "cpu":
        return CpuPages(size, rows, regions)
    if device.type == "cuda":
        from liveprune.patches.cuda_memory import CudaPages

        return CudaPages(size, device)
    raise EngineError(f"elastic memory: found device {device}, expected cpu or cuda")
