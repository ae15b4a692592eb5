"""What the system says of the pages, not what the bookkeeping says."""

from __future__ import annotations

import ctypes
import gc
import mmap
from pathlib import Path

import pytest
import torch

from liveprune.patches import cpu_memory
from liveprune.patches.elastic_memory import elastic_tensor
from liveprune.patches.page_counts import Region
from liveprune.pruning.errors import EngineError

PAGE = mmap.PAGESIZE
MIB = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def resident(tensor: torch.Tensor) -> set[int]:
    """Numbers of the tensor's pages that have memory."""
    size = tensor.numel() * tensor.element_size()
    found = ctypes.create_string_buffer(-(-size // PAGE))
    if _libc.mincore(tensor.data_ptr(), size, found) != 0:
        raise OSError(ctypes.get_errno(), "mincore")
    return {page for page, state in enumerate(found.raw) if state & 1}


def touched(rows: set[int], row_bytes: int) -> set[int]:
    return {
        page
        for row in rows
        for page in range(row * row_bytes // PAGE, ((row + 1) * row_bytes - 1) // PAGE + 1)
    }


# Below, between, above and exactly at huge pages.
@pytest.mark.parametrize("row_bytes", [100_000, 1 * MIB, 3_000_000, 4 * MIB, 5 * MIB])
def test_exactly_the_pages_of_committed_rows_are_resident(row_bytes: int) -> None:
    elastic = elastic_tensor((8, row_bytes), torch.uint8, "cpu")
    assert resident(elastic.tensor) == set()
    elastic.commit({1, 3, 4, 5})
    for row in (1, 3, 4, 5):
        elastic.tensor[row] = row
    assert resident(elastic.tensor) == touched({1, 3, 4, 5}, row_bytes)
    gone = touched({1, 3, 4, 5}, row_bytes) - touched({1, 4}, row_bytes)
    assert elastic.release([3, 5]) == len(gone) * PAGE
    assert resident(elastic.tensor) == touched({1, 4}, row_bytes)
    assert elastic.resident_bytes == len(touched({1, 4}, row_bytes)) * PAGE
    assert (elastic.tensor[1] == 1).all()
    assert (elastic.tensor[4] == 4).all()


def test_whole_pages_come_back_as_zeros() -> None:
    elastic = elastic_tensor((4, 2 * PAGE), torch.uint8, "cpu")
    elastic.commit(range(4))
    elastic.tensor.fill_(7)
    elastic.release([1, 2])
    elastic.commit([2])
    assert not elastic.tensor[1:3].any()
    assert (elastic.tensor[[0, 3]] == 7).all()


def test_rows_start_at_a_huge_page() -> None:
    assert elastic_tensor((3, 5), torch.float32, "cpu").tensor.data_ptr() % (2 * MIB) == 0


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(x, 16) for x in line.split()[0].split("-"))
        if start <= address < stop:
            return True
    return False


def test_the_addresses_live_as_long_as_any_view() -> None:
    elastic = elastic_tensor((4, 64 * MIB), torch.uint8, "cpu")
    elastic.commit([3])
    view = torch.nn.Parameter(elastic.tensor[3:].view(torch.int32), requires_grad=False)
    del elastic
    gc.collect()
    view.fill_(5)
    assert (view[0, :10] == 5).all()
    address = view.data_ptr()
    assert is_mapped(address)
    del view
    gc.collect()
    assert not is_mapped(address)


def test_a_huge_page_lies_within_one_row() -> None:
    def rows_of(size: int, rows: int = 4) -> list[tuple[int, int]]:
        return cpu_memory._huge_pages(rows, [Region(0, size, size)])

    assert rows_of(1 * MIB) == []
    assert rows_of(2 * MIB) == [(0, 4)]
    # Row 0 is MiB 0-3, row 1 3-6, row 2 6-9, row 3 9-12; of the pages, only 1 and 4 are shared.
    assert rows_of(3 * MIB) == [(0, 1), (2, 4), (5, 6)]
    # Rows of 2.5 MiB: 0-2.5, 2.5-5, 5-7.5, 7.5-10; pages 1, 2 and 3 are shared.
    assert rows_of(5 * MIB // 2) == [(0, 1), (4, 5)]
    # A row in two places, its second right after the first's last.
    both = [Region(0, 2 * MIB, 2 * MIB), Region(4 * MIB, 4 * MIB, 3 * MIB)]
    assert cpu_memory._huge_pages(2, both) == [(0, 3), (4, 5)]


def test_few_map_entries_left_means_small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_memory, "_spare_map_entries", lambda: 5)
    assert cpu_memory._huge_pages(4, [Region(0, 3 * MIB, 3 * MIB)]) == []
    monkeypatch.setattr(cpu_memory, "_spare_map_entries", lambda: 6)
    assert cpu_memory._huge_pages(4, [Region(0, 3 * MIB, 3 * MIB)]) == [(0, 1), (2, 4), (5, 6)]


def test_too_many_bytes_are_refused() -> None:
    with pytest.raises(EngineError, match=f"no addresses for {1 << 60} bytes"):
        elastic_tensor((1 << 30, 1 << 30), torch.uint8, "cpu")
