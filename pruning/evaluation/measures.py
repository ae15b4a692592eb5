"""What a measure makes of the engine's numbers: one value a row, in [0, 1], larger is better.

Of labelled rows:

* ``exact``: greedy decoding gives the gold answer and ends there;
* ``contains``: the gold answer occurs in what greedy decoding gives;
* ``choice``: the right choice has the largest log-likelihood.

Without labels, over the tokens of the full model's own greedy answers:

* ``esap``: the expected acceptance rate of speculative sampling with the plan as the draft,
  1 - total variation (EvoESAP, arXiv:2603.06003, section 3);
* ``kl``: exp(-Kullback-Leibler divergence of the plan from the full model);
* ``nll``: exp(log-probability of the full model's tokens), 1 / perplexity.

The last two are means over the tokens first. The exponential makes them bounded and larger-is-
better like the others, and keeps one row that goes wrong from outweighing all the rest; within a
row it changes no ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from liveprune.pruning.errors import DataError
from liveprune.pruning.evaluation.engine import Vector
from liveprune.pruning.evaluation.rows import Form, Question, Tokens


@dataclass(frozen=True)
class Measure:
    """What a measure needs of the rows and of the engine."""

    form: Form
    binary: bool
    """Every value is 0 or 1."""
    generates: bool
    """Answers may be generated, up to a number of tokens."""
    against_full: bool = False
    """Compares distributions with the full model's."""


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "exact": Measure("answer", binary=True, generates=True),
        "contains": Measure("answer", binary=True, generates=True),
        "choice": Measure("choices", binary=True, generates=False),
        "esap": Measure("prompt", binary=False, generates=True, against_full=True),
        "kl": Measure("prompt", binary=False, generates=True, against_full=True),
        "nll": Measure("prompt", binary=False, generates=True),
    }
)


def measure_of(name: str) -> Measure:
    """Find a measure by its name.

    Raises:
        DataError: there is none of that name.
    """
    if name not in MEASURES:
        raise DataError(f"measure is {name!r}, expected one of {', '.join(MEASURES)}")
    return MEASURES[name]


def row_means(numbers: Vector, lengths: Sequence[int]) -> Vector:
    """Mean of each row's numbers, NaN where one is not finite; rows lie one after another."""
    starts = np.cumsum([0, *lengths[:-1]])
    with np.errstate(invalid="ignore"):  # infinity minus infinity; becomes NaN below
        sums = np.add.reduceat(numbers, starts)
    finite = np.logical_and.reduceat(np.isfinite(numbers), starts)
    means: Vector = np.where(finite, sums, np.nan) / np.asarray(lengths)
    return means


def agreement(measure: str, numbers: Vector, lengths: Sequence[int]) -> Vector:
    """[rows]: ``esap`` of overlaps, ``kl`` of divergences or ``nll`` of log-probabilities."""
    means = row_means(numbers, lengths)
    shaped: Mapping[str, Callable[[Vector], Vector]] = {
        "esap": lambda x: x,
        "kl": lambda x: np.exp(-x),
        "nll": np.exp,
    }
    # Rounding may carry a sum of probabilities over 1 and a divergence below 0.
    return np.clip(shaped[measure](means), 0.0, 1.0)


def choice_values(logprobs: Vector, rows: Sequence[Question]) -> Vector:
    """[rows]: 1 where the right choice is the likeliest, the first of equal ones.

    ``logprobs`` are those of all choices' tokens, one choice after another.
    """
    lengths = [len(answer) for row in rows for answer in row.answers]
    sums = row_means(logprobs, lengths) * lengths
    values = np.empty(len(rows))
    start = 0
    for i, row in enumerate(rows):
        of_row = sums[start : start + len(row.answers)]
        start += len(row.answers)
        right = float(np.argmax(of_row) == row.right)
        values[i] = right if np.isfinite(of_row).all() else np.nan
    return values


def first_miss(
    predicted: npt.NDArray[np.int64], answer: Tokens, end: Collection[int]
) -> int | None:
    """Place of the first token that greedy decoding gives otherwise; None if it gives the answer.

    ``answer`` ends with an end token; any token of ``end`` ends it as well.
    """
    differs = np.flatnonzero(predicted != np.asarray(answer))
    if not len(differs):
        return None
    place = int(differs[0])
    if place == len(answer) - 1 and int(predicted[place]) in end:
        return None
    return place


def may_recover(text: str, gold: str) -> bool:
    """Whether an answer that begins with ``text`` may still decode to ``gold``.

    Another tokenisation of the same text is the only way; a character of which only some bytes
    are there yet decodes to U+FFFD.
    """
    return gold.startswith(text.rstrip("\ufffd").strip())
