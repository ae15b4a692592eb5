from __future__ import annotations

import gc
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liveprune.patches.cuda_memory import CudaPages
from liveprune.patches.elastic_memory import ElasticTensor, elastic_tensor
from liveprune.patches.page_counts import Region
from liveprune.pruning.errors import EngineError, IncompatibleEnvironmentError

GRANULE = 64
BASE = 1 << 40
DEVICE = torch.device("cuda", 1)


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2


class FakeDriver:
    """``cuda.bindings.driver`` without a device: checks each call as the driver would."""

    CUresult = Result
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE="device")
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED="pinned")
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE="rw")
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM="least")

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.calls: list[str] = []
        self.handles: set[int] = set()
        self.mapped: dict[int, int] = {}
        self.readable: set[int] = set()
        self.reserved = 0
        self.context: list[str] = []
        self.synchronized = False

    def CUmemAllocationProp(self) -> Any:  # noqa: N802
        return SimpleNamespace(location=SimpleNamespace())

    def CUmemAccessDesc(self) -> Any:  # noqa: N802
        return SimpleNamespace(location=SimpleNamespace())

    def __getattr__(self, name: str) -> Any:
        answer = getattr(type(self), f"_{name}")

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            result = answer(self, *arguments)
            if isinstance(result, Result):
                return (result,)
            return (Result.CUDA_SUCCESS,) if result is None else (Result.CUDA_SUCCESS, result)

        return call

    def _pages(self, address: int, size: int) -> range:
        assert (address - BASE) % GRANULE == 0
        assert size % GRANULE == 0
        return range((address - BASE) // GRANULE, (address - BASE + size) // GRANULE)

    def _cuInit(self, flags: int) -> None:  # noqa: N802
        assert flags == 0

    def _cuDeviceGet(self, ordinal: int) -> str:  # noqa: N802
        return f"device {ordinal}"

    def _cuDevicePrimaryCtxRetain(self, device: str) -> str:  # noqa: N802
        return f"context of {device}"

    def _cuCtxPushCurrent(self, context: str) -> None:  # noqa: N802
        self.context.append(context)

    def _cuCtxPopCurrent(self) -> str:  # noqa: N802
        return self.context.pop()

    def _cuCtxSynchronize(self) -> None:  # noqa: N802
        assert self.context == ["context of device 1"]
        self.synchronized = True

    def _cuMemGetAllocationGranularity(self, prop: Any, option: str) -> int:  # noqa: N802
        assert (prop.type, prop.location.type, prop.location.id) == ("pinned", "device", 1)
        assert option == "least"
        return GRANULE

    def _cuMemAddressReserve(self, size: int, alignment: int, hint: int, flags: int) -> int:  # noqa: N802
        assert (size % GRANULE, alignment, hint, flags) == (0, 0, 0, 0)
        self.reserved = size
        return BASE

    def _cuMemAddressFree(self, address: int, size: int) -> Result | None:  # noqa: N802
        if (address, size) != (BASE, self.reserved) or self.mapped:
            return Result.CUDA_ERROR_INVALID_VALUE
        self.reserved = 0
        return None

    def _cuMemCreate(self, size: int, prop: Any, flags: int) -> Any:  # noqa: N802
        assert (size, flags) == (GRANULE, 0)
        if len(self.handles) >= self.room:
            return Result.CUDA_ERROR_OUT_OF_MEMORY
        handle = next(i for i in range(1, self.room + 2) if i not in self.handles)
        self.handles.add(handle)
        return handle

    def _cuMemRelease(self, handle: int) -> None:  # noqa: N802
        self.handles.remove(handle)

    def _cuMemMap(self, at: int, size: int, offset: int, handle: int, flags: int) -> Result | None:  # noqa: N802
        (page,) = self._pages(at, size)
        assert (offset, flags) == (0, 0)
        assert handle in self.handles
        if page in self.mapped or (page + 1) * GRANULE > self.reserved:
            return Result.CUDA_ERROR_INVALID_VALUE
        self.mapped[page] = handle
        return None

    def _cuMemSetAccess(self, at: int, size: int, access: list[Any], count: int) -> Result | None:  # noqa: N802
        assert count == len(access) == 1
        assert (access[0].flags, access[0].location.id) == ("rw", 1)
        if not set(self._pages(at, size)) <= set(self.mapped):
            return Result.CUDA_ERROR_INVALID_VALUE
        self.readable |= set(self._pages(at, size))
        return None

    def _cuMemsetD8(self, at: int, value: int, size: int) -> None:  # noqa: N802
        assert self.context == ["context of device 1"]
        assert value == 0
        assert set(self._pages(at, size)) <= self.readable

    def _cuStreamSynchronize(self, stream: int) -> None:  # noqa: N802
        assert stream == 0

    def _cuMemUnmap(self, at: int, size: int) -> Result | None:  # noqa: N802
        (page,) = self._pages(at, size)
        assert self.synchronized
        if self.mapped.pop(page, None) is None:
            return Result.CUDA_ERROR_INVALID_VALUE
        self.readable.discard(page)
        return None


def elastic(driver: FakeDriver, rows: int, row_bytes: int) -> ElasticTensor:
    pages = CudaPages(rows * row_bytes, DEVICE, driver)
    return ElasticTensor(torch.zeros(0), rows, [Region(0, row_bytes, row_bytes)], pages)


def granules(rows: set[int], row_bytes: int) -> set[int]:
    return {row * row_bytes // GRANULE for row in rows} | {
        byte // GRANULE for row in rows for byte in range(row * row_bytes, (row + 1) * row_bytes)
    }


STEPS = st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 9))), max_size=8)


@given(row_bytes=st.integers(1, 200), steps=STEPS)
def test_exactly_the_granules_of_committed_rows_are_mapped(
    row_bytes: int, steps: list[tuple[bool, set[int]]]
) -> None:
    driver = FakeDriver()
    tensor = elastic(driver, 10, row_bytes)
    committed: set[int] = set()
    for commit, rows in steps:
        driver.synchronized = False
        if commit:
            tensor.commit(rows)
            committed |= rows
        else:
            tensor.release(rows)
            committed -= rows
        assert set(driver.mapped) == driver.readable == granules(committed, row_bytes)
        assert driver.handles == set(driver.mapped.values())
        assert driver.context == []
        assert tensor.resident_bytes == len(driver.mapped) * GRANULE


def test_without_memory_nothing_is_mapped_and_the_call_is_named() -> None:
    driver = FakeDriver(room=5)
    tensor = elastic(driver, 10, GRANULE)
    tensor.commit([0, 1])
    with pytest.raises(EngineError, match=r"^cuMemCreate: .*CUDA_ERROR_OUT_OF_MEMORY"):
        tensor.commit([3, 4, 7, 8])
    assert set(driver.mapped) == {0, 1}
    assert len(driver.handles) == 2
    tensor.commit([3, 4, 7])
    assert set(driver.mapped) == {0, 1, 3, 4, 7}


def test_a_failed_mapping_keeps_no_memory() -> None:
    driver = FakeDriver()
    tensor = elastic(driver, 4, GRANULE)
    driver.mapped[2] = -1  # as if the driver had lost track
    with pytest.raises(EngineError, match=r"^cuMemMap: .*CUDA_ERROR_INVALID_VALUE"):
        tensor.commit(range(4))
    assert driver.mapped.pop(2) == -1
    assert not driver.mapped
    assert not driver.handles


def test_access_and_zeroing_take_one_call_for_neighbours() -> None:
    driver = FakeDriver()
    tensor = elastic(driver, 8, GRANULE)
    driver.calls.clear()
    tensor.commit([1, 2, 3, 6])
    assert driver.calls.count("cuMemSetAccess") == driver.calls.count("cuMemsetD8") == 2
    assert driver.calls.count("cuMemCreate") == 4


def test_everything_is_given_back_with_the_last_reference() -> None:
    driver = FakeDriver()
    tensor = elastic(driver, 4, GRANULE)
    tensor.commit([0, 2])
    del tensor
    gc.collect()
    assert (driver.mapped, driver.handles, driver.reserved) == ({}, set(), 0)


def test_torch_is_shown_the_whole_range() -> None:
    shown = CudaPages(1000, DEVICE, FakeDriver()).__cuda_array_interface__
    assert shown["data"] == (BASE, False)
    assert (shown["shape"], shown["typestr"], shown["strides"]) == ((1000,), "|i1", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without the bindings")
def test_missing_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.driver", None)
    with pytest.raises(IncompatibleEnvironmentError, match="cuda-bindings"):
        elastic_tensor((2, 3), torch.float32, torch.device("cuda", 0))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
MIB = 1 << 20


@pytest.mark.gpu
@needs_gpu
def test_rows_on_a_gpu() -> None:
    elastic = elastic_tensor((16, 3 * MIB), torch.int8, "cuda")
    assert elastic.page_bytes % (2 * MIB) == 0
    elastic.commit([0, 1, 5])
    assert not elastic.tensor[[0, 1, 5]].any()
    for row in (0, 1, 5):
        elastic.tensor[row] = row + 1
    address = elastic.tensor.data_ptr()
    elastic.release([0])
    elastic.commit([2])
    elastic.tensor[2] = 9
    assert elastic.tensor.data_ptr() == address
    assert [int(elastic.tensor[row].float().mean()) for row in (1, 2, 5)] == [2, 9, 6]


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_gets_its_memory_back() -> None:
    def free() -> int:
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0]

    elastic = elastic_tensor((64, 16 * MIB), torch.bfloat16, "cuda")
    before = free()
    elastic.commit(range(64))
    view = elastic.tensor[8:]
    assert before - free() == elastic.resident_bytes == 64 * 32 * MIB
    assert elastic.release(range(32)) == 32 * 32 * MIB
    assert before - free() == 32 * 32 * MIB
    del elastic
    gc.collect()
    assert before - free() == 32 * 32 * MIB  # the view still needs it
    del view
    gc.collect()
    assert free() >= before


@pytest.mark.gpu
@needs_gpu
def test_a_captured_graph_reads_rows_that_came_back() -> None:
    elastic = elastic_tensor((4, MIB), torch.float32, "cuda")
    elastic.commit(range(4))
    total = torch.zeros((), device="cuda")
    row = torch.zeros((), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.copy_(elastic.tensor.index_select(0, row.view(1)).sum())
    elastic.release([1, 2])
    elastic.commit([2])
    elastic.tensor[2] = 3
    row.fill_(2)
    graph.replay()
    assert total.item() == 3 * MIB
