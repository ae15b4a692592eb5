from __future__ import annotations

from collections.abc import Callable

import pytest

from liveprune.pruning.report import numbers
from liveprune.pruning.report.axis import Axis


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (lambda: numbers.fixed(-0.04, 1), "0.0"),
        (lambda: numbers.fixed(-0.06, 1), "\u22120.1"),
        (lambda: numbers.fixed(1234.5, 1, signed=True), "+1,234.5"),
        (lambda: numbers.percent(0.12345, 2), "12.35\xa0%"),
        (lambda: numbers.points(-0.01, 1), "\u22121.0\xa0points"),
        (lambda: numbers.between({"low": -0.1, "high": 0.2}, 0, signed=True), "\u221210 to +20"),
        (lambda: numbers.count(1, "row"), "1\xa0row"),
        (lambda: numbers.count(1200, "row"), "1,200\xa0rows"),
        (lambda: numbers.count(2, "entry", "entries"), "2\xa0entries"),
        (lambda: numbers.significant(0.01234), "0.0123"),
        (lambda: numbers.significant(9.996), "10.0"),
        (lambda: numbers.significant(12345), "12,345"),
        (lambda: numbers.size(999), "999\xa0B"),
        (lambda: numbers.size(1_500_000), "1.50\xa0MB"),
        (lambda: numbers.times(1.5), "1.50\xd7"),
        (lambda: numbers.seconds(0.5), "0.500\xa0s"),
        (lambda: numbers.seconds(59.7), "1\xa0min 0\xa0s"),
        (lambda: numbers.seconds(3_725), "1\xa0h 2\xa0min"),
        (lambda: numbers.runs([0, 1, 2, 4, 6, 7]), "0\u20132, 4, 6, 7"),
        (lambda: numbers.runs([0, 2, 4, 6], 2), "0, 2 and 2 more"),
        (lambda: numbers.span([4, 2, 6]), "2 to 6"),
        (lambda: numbers.span([4, 4]), "4"),
    ],
)
def test_as_people_read_them(found: Callable[[], str], text: str) -> None:
    assert found() == text


@pytest.mark.parametrize(("width", "decimals"), [(0.2, 1), (0.005, 2), (0.0001, 3), (0, 1)])
def test_decimals_show_the_narrowest_interval(width: float, decimals: int) -> None:
    intervals = [{"low": 0.5, "high": 0.9}, {"low": 0.5, "high": 0.5 + width}]
    intervals.append({"low": None, "high": None})  # type: ignore[dict-item]
    assert numbers.decimals_for(intervals) == decimals


@pytest.mark.parametrize("values", [[0.2, 0.9], [0.5], [0.5001, 0.5002], [-3.0, 1e6]])
def test_an_axis_has_room_for_its_values_and_its_ticks(values: list[float]) -> None:
    axis = Axis.around(values, 300, 20)
    pixels = [axis(value) for value in values]
    assert all(20 < pixel < 300 for pixel in pixels)
    assert pixels == sorted(pixels, reverse=True)
    ticks, decimals = axis.ticks(6, 1.0)
    assert 1 <= len(ticks) <= 7
    assert all(axis.low <= tick <= axis.high for tick in ticks)
    written = [f"{tick:.{decimals}f}" for tick in ticks]
    assert len(set(written)) == len(ticks)
    assert [float(text) for text in written] == pytest.approx(ticks)


def test_ticks_of_scores_stay_between_none_and_all() -> None:
    ticks, decimals = Axis(-0.2, 1.3, 0, 100).score_ticks(6)
    assert ticks == pytest.approx([0.0, 0.5, 1.0])
    assert decimals == 0
