from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.pareto.front import Coordinates, dominates, front
from liveprune.pruning.pareto.timing import Ratio


def at(quality: float, size: int, speed: tuple[float, float] | None = None) -> Coordinates:
    ratio = None if speed is None else Ratio((speed[0] + speed[1]) / 2, *speed)
    return Coordinates(quality, size, ratio)


def test_better_somewhere_and_nowhere_worse() -> None:
    full = at(0.9, 100)
    assert front([full, at(0.9, 50), at(0.8, 50), at(0.8, 40), at(0.95, 120)]) == (
        False,  # the second has its quality with fewer bytes
        True,
        False,
        True,
        True,
    )


def test_equal_points_are_all_on_the_front() -> None:
    assert front([at(0.5, 10), at(0.5, 10), at(0.4, 10)]) == (True, True, False)


def test_speed_counts_only_where_the_spreads_part() -> None:
    good, slow, fast = at(0.9, 10, (1.0, 1.2)), at(0.8, 10, (1.1, 1.3)), at(0.8, 10, (1.21, 1.4))
    assert front([good, slow, fast]) == (True, False, True)
    assert front([good, at(0.8, 10, None)]) == (True, False)


def test_what_is_off_the_front_is_dominated_by_a_point_on_it() -> None:
    """The second is dominated by the first, the third by the second alone."""
    points = [at(0.9, 10, (1.0, 1.1)), at(0.8, 10, (1.05, 1.2)), at(0.7, 10, (1.15, 1.3))]
    assert dominates(points[0], points[1])
    assert dominates(points[1], points[2])
    assert not dominates(points[0], points[2])
    assert front(points) == (True, False, True)


coordinates = st.builds(
    lambda quality, size, low, width: at(quality / 4, size, (low / 4, (low + width) / 4)),
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(0, 3),
)


@given(st.lists(coordinates, min_size=1, max_size=8))
def test_the_front_is_what_its_definition_says_in_any_order(points: list[Coordinates]) -> None:
    found = front(points)
    kept = [point for point, on in zip(points, found, strict=True) if on]
    assert not any(dominates(a, b) for a, b in itertools.permutations(kept, 2))
    for point, on in zip(points, found, strict=True):
        assert on or any(dominates(other, point) for other in kept)
    assert front(points[::-1]) == found[::-1]
