from __future__ import annotations

import math

import numpy as np
import pytest

from liveprune.pruning.errors import DataError
from liveprune.pruning.evaluation.measures import (
    agreement,
    choice_values,
    first_miss,
    may_recover,
    measure_of,
    row_means,
)
from liveprune.pruning.evaluation.rows import Question

INFINITY = math.inf


def test_an_unknown_measure_names_the_known_ones() -> None:
    with pytest.raises(DataError, match="'bleu', expected one of exact, contains, choice, esap"):
        measure_of("bleu")


def test_row_means_keep_rows_apart() -> None:
    numbers = np.array([1.0, 3.0, 5.0, np.nan, 1.0, INFINITY, -INFINITY, 4.0])
    found = row_means(numbers, [2, 1, 2, 2, 1])
    np.testing.assert_equal(found, [2, 5, np.nan, np.nan, 4])


def test_agreement_by_hand() -> None:
    numbers = np.array([0.5, 1.0, 0.25])
    assert agreement("esap", numbers, [2, 1]).tolist() == [0.75, 0.25]
    assert agreement("kl", numbers, [2, 1]) == pytest.approx([math.exp(-0.75), math.exp(-0.25)])
    assert agreement("nll", -numbers, [2, 1]) == pytest.approx([math.exp(-0.75), math.exp(-0.25)])


def test_agreement_of_equal_distributions_is_one_in_spite_of_rounding() -> None:
    assert agreement("esap", np.array([1 + 1e-7]), [1]).tolist() == [1]
    assert agreement("kl", np.array([-1e-8]), [1]).tolist() == [1]


def choices(*lengths: int, right: int) -> Question:
    return Question((1,), tuple((5,) * length for length in lengths), right)


def test_choice_sums_tokens_without_dividing_by_the_length() -> None:
    logprobs = np.array([-3.0, -1.0, -1.0, -2.5, -0.1])
    rows = [choices(1, 2, right=1), choices(1, 1, right=0)]
    assert choice_values(logprobs, rows).tolist() == [1, 0]


def test_choice_takes_the_first_of_equal_ones() -> None:
    rows = [choices(1, 1, right=0), choices(1, 1, right=1)]
    assert choice_values(np.full(4, -1.0), rows).tolist() == [1, 0]


@pytest.mark.parametrize("bad", [math.nan, -INFINITY])
def test_choice_is_nan_where_a_number_is_not_finite(bad: float) -> None:
    rows = [choices(1, 1, right=0), choices(1, 1, right=0)]
    found = choice_values(np.array([-1.0, bad, -1.0, -2.0]), rows)
    np.testing.assert_equal(found, [np.nan, 1])


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ([5, 6, 2], None),
        ([5, 6, 3], None),  # another end token
        ([5, 6, 9], 2),
        ([5, 3, 2], 1),  # an end token too early
        ([9, 6, 9], 0),
    ],
)
def test_first_miss(predicted: list[int], expected: int | None) -> None:
    assert first_miss(np.array(predicted), (5, 6, 2), {2, 3}) == expected


def test_may_recover() -> None:
    assert may_recover("pos", "positive")
    assert may_recover(" pos", "positive")
    assert may_recover("positive", "positive")
    assert may_recover("caf\ufffd", "café")
    assert not may_recover("neg", "positive")
    assert not may_recover("positives", "positive")
