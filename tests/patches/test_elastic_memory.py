from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liveprune.patches.elastic_memory import ElasticTensor, elastic_bytes, elastic_tensor
from liveprune.patches.page_counts import Region, Runs
from liveprune.pruning.errors import EngineError

PAGE = 16


@dataclass
class RecordingPages:
    """Pages as a plain set; refuses what a real backend could not do."""

    page_bytes: int = PAGE
    mapped: set[int] = field(default_factory=set)
    calls: list[tuple[str, Runs]] = field(default_factory=list)
    room: int = 1 << 30

    def tensor(self) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int8)

    def map(self, runs: Runs) -> None:
        pages = [page for start, stop in runs for page in range(start, stop)]
        assert not self.mapped & set(pages)
        assert len(pages) == len(set(pages))
        if len(self.mapped) + len(pages) > self.room:
            raise EngineError("full")
        self.mapped |= set(pages)
        self.calls.append(("map", runs))

    def unmap(self, runs: Runs) -> None:
        pages = {page for start, stop in runs for page in range(start, stop)}
        assert pages <= self.mapped
        self.mapped -= pages
        self.calls.append(("unmap", runs))


def touched(rows: set[int], regions: tuple[Region, ...]) -> set[int]:
    """Byte by byte."""
    return {
        (region.offset + row * region.stride + byte) // PAGE
        for row in rows
        for region in regions
        for byte in range(region.extent)
    }


REGIONS = st.lists(
    st.builds(Region, st.integers(0, 200), stride=st.integers(1, 50), extent=st.integers(1, 60)),
    min_size=1,
    max_size=3,
).map(tuple)
STEPS = st.lists(
    st.tuples(st.sampled_from(["commit", "release"]), st.sets(st.integers(0, 11))), max_size=8
)


@given(regions=REGIONS, steps=STEPS)
def test_a_page_has_memory_iff_a_committed_row_touches_it(
    regions: tuple[Region, ...], steps: list[tuple[str, set[int]]]
) -> None:
    pages = RecordingPages()
    tensor = ElasticTensor(pages.tensor(), 12, regions, pages)
    committed: set[int] = set()
    for action, rows in steps:
        before = touched(committed, regions)
        if action == "commit":
            committed |= rows
            tensor.commit(rows)
        else:
            committed -= rows
            freed = before - touched(committed, regions)
            assert tensor.release(rows) == len(freed) * PAGE
        assert pages.mapped == touched(committed, regions)
        assert tensor.resident_bytes == len(pages.mapped) * PAGE


@given(regions=REGIONS, first=st.sets(st.integers(0, 11)), more=st.sets(st.integers(0, 11)))
def test_a_commit_without_memory_changes_nothing(
    regions: tuple[Region, ...], first: set[int], more: set[int]
) -> None:
    pages = RecordingPages()
    tensor = ElasticTensor(pages.tensor(), 12, regions, pages)
    tensor.commit(first)
    pages.room = len(pages.mapped)
    if touched(first | more, regions) == touched(first, regions):
        tensor.commit(more)
        return
    with pytest.raises(EngineError, match="full"):
        tensor.commit(more)
    assert pages.mapped == touched(first, regions)
    pages.room = 1 << 30
    tensor.commit(more)
    assert pages.mapped == touched(first | more, regions)


def test_neighbouring_rows_go_in_one_call() -> None:
    pages = RecordingPages()
    # Two layers of eight rows of half a page each, one right after the other.
    regions = (Region(0, 8, 8), Region(64, 8, 8))
    tensor = ElasticTensor(pages.tensor(), 8, regions, pages)
    tensor.commit(range(8))
    assert tensor.release([6, 7, 0, 1]) == 4 * PAGE
    assert pages.calls == [("map", [(0, 8)]), ("unmap", [(0, 1), (3, 5), (7, 8)])]


def test_rows_that_do_not_exist_are_refused() -> None:
    pages = RecordingPages()
    tensor = ElasticTensor(pages.tensor(), 4, (Region(0, 16, 16),), pages)
    for action in (tensor.commit, tensor.release):
        with pytest.raises(EngineError, match=r"found rows 1 to 4, expected rows within 0 to 3"):
            action([1, 4])
        with pytest.raises(EngineError, match=r"found rows -1 to 2"):
            action([2, -1])
    assert not pages.calls


def test_shapes_and_dtypes() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        made = elastic_tensor((3, 5, 7), dtype, "cpu")
        assert (made.tensor.shape, made.tensor.dtype) == ((3, 5, 7), dtype)
        assert made.tensor.is_contiguous()
        assert not made.tensor.any()
        assert made.resident_bytes == 0
        made.commit([1])
        assert made.resident_bytes == made.page_bytes


def test_bytes_are_as_many_as_asked_for() -> None:
    made = elastic_bytes(1000, 10, [Region(0, 100, 100)], torch.device("cpu"))
    assert (made.tensor.shape, made.tensor.dtype) == ((1000,), torch.int8)
    assert made.tensor.untyped_storage().nbytes() == 1000


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(EngineError, match="found 0 bytes"):
        elastic_tensor((0, 4), torch.float32, "cpu")
    with pytest.raises(EngineError, match="found device meta"):
        elastic_tensor((2, 4), torch.float32, "meta")
