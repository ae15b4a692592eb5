"""The pages of elastic memory on a GPU: a reserved range of addresses, mapped page by page."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from liveprune.patches.page_counts import Runs
from liveprune.pruning.errors import EngineError, IncompatibleEnvironmentError

LEGACY_STREAM = 0


class CudaPages:
    """Pages of the granularity in which the device maps memory (2 MiB).

    torch keeps this object for as long as any view of its tensor lives, and with it the addresses.
    """

    def __init__(self, size: int, device: torch.device, driver: Any = None) -> None:
        """``driver``: what to use instead of ``cuda.bindings.driver``.

        Raises:
            EngineError: the driver cannot reserve so many addresses.
            IncompatibleEnvironmentError: ``cuda.bindings`` is not installed.
        """
        self._size = size
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._range = _Range(driver or _bindings(), index, size)
        self.page_bytes = self._range.granularity
        # Not at exit: by then torch may be half gone, and the system takes the memory anyway.
        weakref.finalize(self, self._range.close).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self._size,),
            "typestr": "|i1",
            "data": (self._range.address, False),
            "strides": None,
            "version": 3,
        }

    def tensor(self) -> torch.Tensor:
        # torch asks the driver whose memory this is, which it only knows of mapped addresses.
        first = [(0, 1)]
        self.map(first)
        try:
            return torch.as_tensor(self, device=self._device)
        finally:
            self.unmap(first)

    def map(self, runs: Runs) -> None:
        with self._range.current():
            done: Runs = []
            try:
                for start, stop in runs:
                    done.append((start, stop))
                    self._range.map(start, stop)
            except EngineError:
                self._range.unmap(done)
                raise

    def unmap(self, runs: Runs) -> None:
        if runs:
            with self._range.current():
                self._range.unmap(runs)


class _Range:
    """Reserved addresses, and the physical memory behind each page that has some."""

    def __init__(self, driver: Any, device: int, size: int) -> None:
        self._driver = driver
        self._call("cuInit", 0)
        # torch's own context: kept for the life of the process, as torch does.
        self._context = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", device))
        place = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._allocation = driver.CUmemAllocationProp()
        self._allocation.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._allocation.location.type = place
        self._allocation.location.id = device
        self._access = driver.CUmemAccessDesc()
        self._access.location.type = place
        self._access.location.id = device
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(self._call("cuMemGetAllocationGranularity", self._allocation, least))
        self._reserved = -(-size // self.granularity) * self.granularity
        self.address = int(self._call("cuMemAddressReserve", self._reserved, 0, 0, 0))
        self._handles: dict[int, Any] = {}

    @contextmanager
    def current(self) -> Iterator[None]:
        """Calls inside work on this device, whatever the thread used before."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def map(self, start: int, stop: int) -> None:
        """Give pages memory, zeroed; after an EngineError some of them may have it."""
        for page in range(start, stop):
            handle = self._call("cuMemCreate", self.granularity, self._allocation, 0)
            try:
                self._call("cuMemMap", self._at(page), self.granularity, 0, handle, 0)
            except EngineError:
                self._call("cuMemRelease", handle)
                raise
            self._handles[page] = handle
        size = (stop - start) * self.granularity
        self._call("cuMemSetAccess", self._at(start), size, [self._access], 1)
        # Attention multiplies what lies behind a sequence by zero: NaN left there would spread.
        self._call("cuMemsetD8", self._at(start), 0, size)
        # Streams of torch do not wait for the legacy one.
        self._call("cuStreamSynchronize", LEGACY_STREAM)

    def unmap(self, runs: Runs) -> None:
        """Take the memory of those of the pages that have some."""
        # A kernel that was launched before may still read them.
        self._call("cuCtxSynchronize")
        for page in (page for start, stop in runs for page in range(start, stop)):
            handle = self._handles.pop(page, None)
            if handle is not None:
                # One mapping at a time: the driver unmaps only what was mapped by one call.
                self._call("cuMemUnmap", self._at(page), self.granularity)
                self._call("cuMemRelease", handle)

    def close(self) -> None:
        """Give everything back, the addresses too."""
        with self.current():
            self.unmap([(0, self._reserved // self.granularity)])
            self._call("cuMemAddressFree", self.address, self._reserved)

    def _at(self, page: int) -> int:
        return self.address + page * self.granularity

    def _call(self, name: str, *arguments: Any) -> Any:
        result, *values = getattr(self._driver, name)(*arguments)
        if result != self._driver.CUresult.CUDA_SUCCESS:
            raise EngineError(f"{name}: the CUDA driver answered {result!r}, expected success")
        return values[0] if values else None


def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise IncompatibleEnvironmentError(
            f"elastic memory on a GPU needs the package cuda-bindings: {error}"
        ) from error
