"""The fast estimator against NumPy's own functions, called pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from liveprune.pruning import nmi as module
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.nmi import Digitised, digitise, mutual_information, nmi, pairwise_nmi

Matrix = npt.NDArray[np.floating[Any]]


def plain(a: Matrix, b: Matrix) -> float:
    """As published, with NumPy's histograms."""
    counts_a, edges_a = np.histogram(a, bins="auto")
    counts_b, edges_b = np.histogram(b, bins="auto")
    joint = np.histogram2d(a.ravel(), b.ravel(), bins=[edges_a, edges_b])[0]

    def entropy(counts: npt.NDArray[Any]) -> float:
        shares = counts[counts > 0].astype(np.float64) / a.size
        return float(-np.sum(shares * np.log(shares)))

    h_a, h_b = entropy(counts_a), entropy(counts_b)
    return (h_a + h_b - entropy(joint)) / math.sqrt(h_a * h_b)


def grid(rng: np.random.Generator, n: int) -> Matrix:
    """Multiples of 1/8, the range a multiple, too: many entries lie on edges, the last included."""
    values = rng.integers(-8, 9, n) / 8
    values[:2] = -1, 1
    return values


DRAWS: dict[str, Callable[[np.random.Generator, int], Matrix]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "uniform": lambda rng, n: rng.random(n),
    "heavy tails": lambda rng, n: rng.standard_t(3, n),
    "very heavy tails": lambda rng, n: rng.standard_t(1.5, n),
    "one outlier": lambda rng, n: np.append(rng.standard_normal(n - 1), 1e4),
    "mostly zero": lambda rng, n: rng.standard_normal(n) * (rng.random(n) < 0.1),
    "two values": lambda rng, n: rng.integers(0, 2, n).astype(np.float64),
    "on edges": grid,
    "far from zero": lambda rng, n: 20 + rng.standard_normal(n),
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", DRAWS)
def test_equals_numpy(name: str, dtype: type[np.floating[Any]]) -> None:
    rng = np.random.default_rng(3)
    a = DRAWS[name](rng, 6000).astype(dtype).reshape(60, 100)
    b = (0.5 * a + DRAWS[name](rng, 6000).reshape(60, 100)).astype(dtype)
    assert nmi(digitise(a), digitise(b)) == pytest.approx(plain(a, b), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", DRAWS)
def test_codes_are_those_of_a_search_in_the_edges(name: str, dtype: type[np.floating[Any]]) -> None:
    values = DRAWS[name](np.random.default_rng(4), 70_000).astype(dtype)
    edges = np.histogram_bin_edges(values, "auto")
    expected = np.searchsorted(edges, values, side="right") - 1
    expected[values == edges[-1]] = len(edges) - 2
    digitised = digitise(values)
    assert np.array_equal(module._codes(values, edges), expected)
    filled, codes = np.unique(expected, return_inverse=True)
    assert digitised.bins == len(filled)
    assert np.array_equal(digitised.codes, codes)


def test_edges_that_are_not_evenly_spaced_are_searched() -> None:
    edges = np.array([0, 0, 0, 1, 2, 9, 10, 10, 10], np.float32)
    values = np.array([0, 0.5, 1, 1.5, 2, 8.9, 9, 9.9, 10], np.float32)
    assert module._codes(values, edges).tolist() == [2, 2, 3, 3, 4, 4, 5, 5, 7]


def test_a_matrix_tells_all_of_itself_and_pairs_are_symmetric() -> None:
    rng = np.random.default_rng(5)
    a, b, c = (digitise(rng.standard_normal((40, 50)).astype(np.float32)) for _ in range(3))
    assert nmi(a, a) == pytest.approx(1, abs=1e-12)
    assert nmi(a, b) == pytest.approx(nmi(b, a), abs=1e-12)
    matrix = pairwise_nmi([a, b, c])
    assert np.array_equal(matrix, matrix.T)
    assert np.array_equal(np.diag(matrix), np.zeros(3))
    assert matrix[0, 2] == nmi(a, c)


def test_by_hand() -> None:
    """A = 0011, B = 0111: joint cells of 1, 1 and 2 of the four entries."""
    a = digitise(np.array([0.0, 0, 1, 1]))
    b = digitise(np.array([0.0, 1, 1, 1]))
    h_b = math.log(4) - 0.75 * math.log(3)
    h_ab = 1.5 * math.log(2)
    expected = math.log(2) + h_b - h_ab
    assert mutual_information(a, b) == pytest.approx(expected)
    assert nmi(a, b) == pytest.approx(expected / math.sqrt(math.log(2) * h_b))


@pytest.mark.parametrize("n", [10_000, 100_000])
def test_independent_data_lie_on_the_floor(n: int) -> None:
    """methods.md, 3.5: 0.032 at 1e4, 0.0145 at 1e5."""
    rng = np.random.default_rng(6)
    a, b = (digitise(rng.standard_normal(n)) for _ in range(2))
    assert nmi(a, b) == pytest.approx({10_000: 0.032, 100_000: 0.0145}[n], rel=0.1)


def test_constants_share_nothing() -> None:
    constant = digitise(np.full(9, 1e20, np.float32))
    varied = digitise(np.arange(9, dtype=np.float32))
    assert (constant.bins, constant.entropy) == (1, 0)
    assert nmi(constant, varied) == nmi(constant, constant) == 0
    assert nmi(digitise(np.ones(1)), digitise(np.zeros(1))) == 0


def test_a_fine_grid_is_counted_by_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    a, b = (digitise(rng.standard_normal(2000)) for _ in range(2))
    dense = nmi(a, b)
    monkeypatch.setattr(module, "DENSE_CELLS", a.bins * b.bins - 1)
    assert nmi(a, b) == pytest.approx(dense, abs=1e-12)
    # More cells than int32 numbers, the last one occupied.
    codes = np.array([0, 65535], np.uint16)
    huge = Digitised(codes, 65536, math.log(2), (2,))
    assert nmi(huge, huge) == pytest.approx(1)


def test_the_null_is_seeded_and_on_the_floor() -> None:
    rng = np.random.default_rng(8)
    base = rng.standard_normal(20_000)
    like, unlike = base + 0.5 * rng.standard_normal(20_000), rng.standard_normal(20_000)
    matrices = [digitise(x) for x in (base, like, unlike)]

    def run(estimator: str, seed: int = 0) -> npt.NDArray[np.float64]:
        return pairwise_nmi(matrices, estimator, np.random.default_rng(seed))

    value, null, corrected = run("plain"), run("shuffled"), run("corrected")
    assert np.array_equal(null, run("shuffled"))
    assert not np.array_equal(null, run("shuffled", 1))
    for matrix in (null, corrected):
        assert np.array_equal(matrix, matrix.T)
    assert value[0, 1] > 5 * null[0, 1]
    # Shuffled, the pair that is alike scores like the pair that never was.
    assert null[0, 1] == pytest.approx(value[0, 2], rel=0.1)
    # The same draws: the correction is exactly the null, and not below 0.
    np.testing.assert_allclose(corrected, np.maximum(0, value - null), atol=1e-12)
    assert (corrected[[0, 1], 2] < 0.1 * null[0, 1]).all()


def test_steps() -> None:
    steps: list[int] = []
    matrices = [digitise(np.arange(5.0))] * 4
    pairwise_nmi(matrices, step=lambda: steps.append(1))
    assert len(steps) == 6
    assert pairwise_nmi([]).shape == (0, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, math.nan], "expert 3: found NaN or infinity"),
        ([1.0, -math.inf], "expert 3: found NaN or infinity"),
        ([], "expert 3: found no entries"),
        ([-1.7e308, 1.7e308], "expert 3: expected numbers that histogram bins can be found for"),
    ],
)
def test_refused(values: list[float], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        digitise(np.array(values), "expert 3")


def test_misuse() -> None:
    a, b = digitise(np.zeros((2, 3))), digitise(np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\), expected equal shapes"):
        nmi(a, b)
    with pytest.raises(ValueError, match="estimator is 'pearson', expected one of plain"):
        pairwise_nmi([a], "pearson")
    with pytest.raises(ValueError, match="found no generator"):
        pairwise_nmi([a], "shuffled")
