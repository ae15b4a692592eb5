from __future__ import annotations

import numpy as np

from liveprune.patches.page_counts import PageCounts, joined


def pages(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(numbers, np.int64)


def test_a_shared_page_is_free_when_both_rows_are_gone() -> None:
    counts = PageCounts(8)
    assert counts.add(pages(1), pages(3)) == [(1, 4)]
    assert counts.add(pages(3), pages(5)) == [(4, 6)]
    assert counts.occupied == 5
    assert counts.remove(pages(1), pages(3)) == [(1, 3)]
    assert counts.remove(pages(3), pages(5)) == [(3, 6)]
    assert counts.occupied == 0


def test_rows_counted_together_may_share_pages_or_lie_apart() -> None:
    counts = PageCounts(20)
    first, last = pages(0, 0, 2, 9), pages(0, 2, 3, 9)
    assert counts.add(first, last) == [(0, 4), (9, 10)]
    assert counts.remove(first[1:], last[1:]) == [(1, 4), (9, 10)]
    assert counts.remove(first[:1], last[:1]) == [(0, 1)]


def test_joined() -> None:
    assert joined([(5, 7), (0, 2), (2, 3), (7, 9)]) == [(0, 3), (5, 9)]
    assert joined([]) == []
