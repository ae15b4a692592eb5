"""Normalised mutual information of equally shaped matrices, element by element, by histograms.

The estimator is NumPy's, to the last count: bins by ``histogram_bin_edges(matrix, "auto")`` for
each matrix on its own, the joint grid of ``histogram2d`` (the last edge belongs to the last bin),
plug-in entropies in nats, ``NMI = (H(A) + H(B) - H(A, B)) / sqrt(H(A) H(B))``. Bins, and with
them every number here, depend on the NumPy version (methods.md, section 3.5).

Each matrix is turned into bin codes once; a pair then costs one pass over two rows of codes.
Memory: 2 bytes a number and matrix for the codes; for a pair 4 bytes a number and the joint counts,
at most 512 MiB. A finer grid is counted by sorting instead: 24 bytes a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from liveprune.pruning.errors import CheckpointError

ESTIMATORS = ("plain", "shuffled", "corrected")
"""Plain; the null, with B's entries in random order; plain less the null, not below 0."""
DENSE_CELLS = 1 << 26
MAX_BINS = 1 << 16
BLOCK = 1 << 16

Floats = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class Digitised:
    """A matrix as bin codes."""

    codes: Codes
    """[numbers] uint16: which of the bins that are not empty each entry is in, row by row."""
    bins: int
    """Bins that are not empty; heavy tails leave many between the outermost ones."""
    entropy: float
    """Of the histogram, in nats."""
    shape: tuple[int, ...]


def digitise(matrix: Floats, name: str = "matrix") -> Digitised:
    """Sort the entries of a float16, float32 or float64 matrix into bins of its own.

    The edges have the matrix's dtype, as NumPy's have. A constant matrix has one bin.

    Raises:
        CheckpointError: the matrix is empty, holds NaN or infinity, or NumPy finds no bins for it;
            begins with ``name``.
    """
    values = matrix.ravel()
    if not values.size or not np.isfinite(values).all():
        found = "NaN or infinity" if values.size else "no entries"
        raise CheckpointError(f"{name}: found {found}, expected finite numbers")
    if (values == values[0]).all():
        return Digitised(np.zeros(values.size, np.uint16), 1, 0.0, matrix.shape)
    try:
        with np.errstate(over="raise", invalid="raise"):
            edges = np.histogram_bin_edges(values, "auto")
    except (ValueError, OverflowError, FloatingPointError, MemoryError) as error:
        raise CheckpointError(
            f"{name}: expected numbers that histogram bins can be found for: {error}"
        ) from error
    bins = len(edges) - 1
    if bins > MAX_BINS:
        raise CheckpointError(f"{name}: found {bins} bins, expected at most {MAX_BINS}")
    codes = _codes(values, edges)
    counts = np.bincount(codes)
    filled = counts > 0
    number = (np.cumsum(filled) - 1).astype(np.uint16)
    return Digitised(number[codes], int(filled.sum()), _entropy(counts, values.size), matrix.shape)


def nmi(a: Digitised, b: Digitised) -> float:
    """NMI of two matrices in [0, 1] up to rounding; 0 where one of them is constant.

    Raises:
        ValueError: their shapes differ.
    """
    return _normalised(a, b, mutual_information(a, b))


def mutual_information(
    a: Digitised, b: Digitised, scratch: npt.NDArray[np.int32] | None = None
) -> float:
    """Mutual information in nats.

    Args:
        a: One matrix.
        b: The other.
        scratch: [numbers] int32 that is overwritten; saves allocating it for each pair.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"found matrices of {a.shape} and {b.shape}, expected equal shapes")
    return a.entropy + b.entropy - _entropy(_joint_counts(a, b, scratch), a.codes.size)


def pairwise_nmi(
    matrices: Sequence[Digitised],
    estimator: str = "plain",
    generator: np.random.Generator | None = None,
    step: Callable[[], None] | None = None,
) -> npt.NDArray[np.float64]:
    """NMI of all pairs: [matrices, matrices] float64, symmetric, zero on the diagonal.

    Args:
        matrices: Of equal shape.
        estimator: One of ``ESTIMATORS``. ``shuffled`` puts the later matrix of a pair in random
            order; ``corrected`` takes that value's information from the plain one's.
        generator: Draws the order, one per matrix; only ``plain`` does without.
        step: Called after each pair.

    Raises:
        ValueError: unknown estimator, no generator for one that draws, or shapes differ.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    result = np.zeros((len(matrices), len(matrices)))
    scratch = np.empty(matrices[0].codes.size if matrices else 0, np.int32)
    for j, b in enumerate(matrices):
        null = None if estimator == "plain" else _shuffled(b, generator)
        for i, a in enumerate(matrices[:j]):
            information = 0.0
            if estimator != "shuffled":
                information = mutual_information(a, b, scratch)
            if null is not None:
                chance = mutual_information(a, null, scratch)
                information = chance if estimator == "shuffled" else max(0.0, information - chance)
            result[i, j] = result[j, i] = _normalised(a, b, information)
            if step is not None:
                step()
    return result


def _shuffled(matrix: Digitised, generator: np.random.Generator | None) -> Digitised:
    if generator is None:
        raise ValueError("found no generator, expected one to shuffle with")
    codes = generator.permutation(matrix.codes)
    return Digitised(codes, matrix.bins, matrix.entropy, matrix.shape)


def _normalised(a: Digitised, b: Digitised, information: float) -> float:
    scale = math.sqrt(a.entropy * b.entropy)
    return information / scale if scale else 0.0


def _codes(values: Floats, edges: Floats) -> Codes:
    """What ``searchsorted(edges, values, "right") - 1`` gives, the last edge in the last bin.

    The edges are evenly spaced but for rounding, so the bin is computed, put right by at most one
    against the edges themselves, and checked; a block that fails is searched.
    """
    last = len(edges) - 2
    # float16 fits float32, where it compares alike and computes faster.
    wide = edges.astype(np.float32) if edges.dtype == np.float16 else edges
    low, high = wide[:-1], wide[1:].copy()
    high[-1] = np.inf
    scale = wide.dtype.type((last + 1) / (float(wide[-1]) - float(wide[0])))
    codes = np.empty(values.size, np.uint16)
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK].astype(wide.dtype, copy=False)
        guess = ((block - wide[0]) * scale).astype(np.int64)
        np.minimum(guess, last, out=guess)
        guess -= block < low[guess]
        guess += block >= high[guess]
        if (block < low[guess]).any() or (block >= high[guess]).any():
            guess = np.minimum(np.searchsorted(wide, block, side="right") - 1, last)
        codes[start : start + BLOCK] = guess
    return codes


def _joint_counts(
    a: Digitised, b: Digitised, scratch: npt.NDArray[np.int32] | None
) -> npt.NDArray[np.int64]:
    """How often each pair of codes occurs; zeros may be among the counts."""
    counted: npt.NDArray[np.int64]
    if a.bins * b.bins > DENSE_CELLS:
        joint = a.codes.astype(np.int64) * b.bins + b.codes
        counted = np.unique(joint, return_counts=True)[1]
        return counted
    index = np.multiply(a.codes, np.int32(b.bins), out=scratch, dtype=np.int32)
    index += b.codes
    # torch counts int32 as it is; NumPy would copy it to int64 first.
    counted = torch.bincount(torch.from_numpy(index)).numpy()
    return counted


def _entropy(counts: npt.NDArray[np.int64], total: int) -> float:
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum())
