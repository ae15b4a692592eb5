"""The Pareto front: points that no other is as good as everywhere and better somewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from liveprune.pruning.pareto.timing import Ratio


@dataclass(frozen=True)
class Coordinates:
    """Where a point lies: what is to be large, small, large."""

    quality: float
    bytes: int
    speed: Ratio | None
    """None where it was not measured."""


def front(points: Sequence[Coordinates]) -> tuple[bool, ...]:
    """Which points are on the front, in their order; of equal points all are.

    Quality and bytes are compared as they are. Speeds whose spreads overlap count as equal, or
    noise would put nearly every point on the front. Such a relation is not transitive, so points
    are taken by quality, then bytes, then speed, and each is held against those on the front so
    far: what is off the front is dominated by a point on it. The order never puts a point before
    one that dominates it, so that the front does not depend on it where points are equal.
    """
    order = sorted(range(len(points)), key=lambda i: _rank(points[i], i))
    kept: list[int] = []
    for i in order:
        if not any(dominates(points[j], points[i]) for j in kept):
            kept.append(i)
    return tuple(i in kept for i in range(len(points)))


def dominates(a: Coordinates, b: Coordinates) -> bool:
    """Nowhere worse, and somewhere better."""
    if a.quality < b.quality or a.bytes > b.bytes or _faster(b, a):
        return False
    return a.quality > b.quality or a.bytes < b.bytes or _faster(a, b)


def _faster(a: Coordinates, b: Coordinates) -> bool:
    return a.speed is not None and b.speed is not None and a.speed.low > b.speed.high


def _rank(point: Coordinates, place: int) -> tuple[float, int, float, int]:
    speed = 0.0 if point.speed is None else point.speed.median
    return -point.quality, point.bytes, -speed, place
