"""Alternated measuring: every round runs all sides once, one after another; ratios are paired."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")


def alternate(runs: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """``rounds`` results of each run, after one round that warms up and is dropped."""
    taken: dict[str, list[T]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            result = run()
            if number:
                taken[name].append(result)
    print(f"measured {', '.join(runs)}", file=sys.stderr)
    return taken


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def speed(reference: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """How many times as fast as the reference of the same round."""
    return spread([a / b for a, b in zip(reference, seconds, strict=True)])


def agreement(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> float:
    """Share of the tokens that are equal up to the first difference of each request."""
    equal = total = 0
    for a, b in zip(left, right, strict=True):
        equal += sum(accumulate((x == y for x, y in zip(a, b, strict=True)), min))
        total += len(a)
    return equal / total
