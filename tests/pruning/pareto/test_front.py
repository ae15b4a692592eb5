from __future__ import annotations

import itertools
import random

from liveprune.pruning.pareto.front import Coordinates, dominates, front
from liveprune.pruning.pareto.timing import Ratio


def point(quality: float, size: int, *speed: float) -> Coordinates:
    return Coordinates(quality, size, Ratio(*speed) if speed else None)


def test_by_hand() -> None:
    points = [
        point(1.0, 100),
        point(0.9, 50),
        point(0.9, 60),  # as good as the one before, and larger
        point(0.5, 50),  # worse than the second, and no smaller
        point(0.5, 20),
        point(0.9, 50),  # equal to the second
    ]
    assert front(points) == (True, True, False, False, True, True)


def test_speeds_count_where_their_spreads_part() -> None:
    slow, near, fast = (1.0, 0.9, 1.1), (1.05, 0.95, 1.2), (1.5, 1.4, 1.6)
    assert front([point(1, 10, *slow), point(0.9, 10, *fast)]) == (True, True)
    assert front([point(1, 10, *slow), point(0.9, 10, *near)]) == (True, False)
    assert dominates(point(1, 10, *fast), point(1, 10, *slow))
    assert not dominates(point(1, 10, *near), point(1, 10, *slow))


def test_the_front_does_not_hang_on_the_order() -> None:
    rng = random.Random(0)
    points = [point(rng.randint(0, 3) / 3, rng.randint(1, 4)) for _ in range(6)]
    expected = {p for p, on in zip(points, front(points), strict=True) if on}
    for some in itertools.permutations(points):
        assert {p for p, on in zip(some, front(some), strict=True) if on} == expected
    for p in points:
        assert (p in expected) == (not any(dominates(other, p) for other in points))
