"""EvoESAP's individuals: how many experts each layer gives up (arXiv:2603.06003, methods.md 7.1).

Whole numbers in the router's units, one for each layer that is not skipped; their sum is fixed, and
none is above what its layer can give.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from liveprune.pruning.allocation import proportional

Vector = tuple[int, ...]

GROWTH = {"front-heavy": Fraction(7, 10), "back-heavy": Fraction(13, 10)}


def shapes(layers: int) -> dict[str, list[Fraction]]:
    """The plans to start from, as weights of the layers from the first on, by name.

    The paper names them; what it does not define is ours: ``mid`` rises to the middle and falls,
    ``mid-neg`` is its opposite, ``deep-flat`` rises to the middle and stays there.
    """
    rise = [Fraction(i + 1) for i in range(layers)]
    mid = [Fraction(min(i, layers - 1 - i) + 1) for i in range(layers)]
    quarter = max(1, layers // 4)
    weights = {
        "uniform": [Fraction(1)] * layers,
        "up": rise,
        "down": rise[::-1],
        "mid": mid,
        "mid-neg": [max(mid) + 1 - x for x in mid],
        "block-early": [Fraction(2 if i < quarter else 1) for i in range(layers)],
        "block-late": [Fraction(2 if i >= layers - quarter else 1) for i in range(layers)],
        "alternating": [Fraction(1 + i % 2) for i in range(layers)],
        "deep-flat": [min(x, Fraction((layers + 1) // 2)) for x in rise],
    }
    return weights | {name: [x**i for i in range(layers)] for name, x in GROWTH.items()}


def vector_of(weights: Sequence[Fraction], caps: Sequence[int], total: int) -> Vector:
    """Removals in proportion to ``weights``, by largest remainders under the caps."""
    shares = dict(enumerate(weights))
    found = proportional(shares, dict(enumerate(caps)), total)
    return tuple(found[i] for i in range(len(caps)))


def first_vectors(
    caps: Sequence[int], total: int, size: int, rng: np.random.Generator
) -> list[Vector]:
    """Up to ``size`` different ones: the shapes, ``uniform`` first, then random weights."""
    found: dict[Vector, None] = {}
    for weights in shapes(len(caps)).values():
        found.setdefault(vector_of(weights, caps, total))
    for _ in range(8 * size):  # a small space has fewer
        if len(found) >= size:
            break
        # Drawn in thousandths, so that proportions are exact; never 0.
        drawn = [Fraction(int(x), 1000) for x in rng.integers(1, 1001, len(caps))]
        found.setdefault(vector_of(drawn, caps, total))
    return list(found)[:size]


def mutate(
    vector: Vector,
    caps: Sequence[int],
    rng: np.random.Generator,
    *,
    moves: int,
    delta: int,
    attempts: int,
) -> Vector:
    """Move removals from some layers to others; the sum stays.

    So many moves as the smaller of two draws from 1 to ``moves``. A move takes 1 to ``delta``
    removals from one random layer to another, and is tried again where it breaks a bound, at most
    ``attempts`` times in all.
    """
    changed = list(vector)
    wanted = int(min(rng.integers(1, moves + 1, 2)))
    for _ in range(attempts if len(vector) > 1 else 0):
        if not wanted:
            break
        source, target = rng.choice(len(vector), 2, replace=False).tolist()
        step = int(rng.integers(1, delta + 1))
        if changed[source] >= step and changed[target] + step <= caps[target]:
            changed[source] -= step
            changed[target] += step
            wanted -= 1
    return tuple(changed)
