from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from liveprune.patches import answer_scoring
from liveprune.patches.answer_scoring import score_answers

HEAD = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
"""Output head: logits of a state (a, b) are a, 2b and a + b."""


def logits(states: torch.Tensor) -> torch.Tensor:
    return states @ HEAD.t()


def distribution(state: tuple[float, float]) -> list[float]:
    a, b = state
    shares = [math.exp(x) for x in (a, 2 * b, a + b)]
    return [x / sum(shares) for x in shares]


STATES = [(0.5, -1.0), (0.25, 0.75), (2.0, 2.0)]
FULL = [(0.5, -1.0), (1.0, 0.0), (-1.0, 0.5)]
TARGETS = [2, 0, 1]


@pytest.mark.parametrize("piece", [1, 2, 1000])
def test_scores_by_hand(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_scoring, "LOGIT_BYTES", 4 * 3 * piece)
    found = score_answers(
        logits, torch.tensor(STATES), torch.tensor(TARGETS), 3, torch.tensor(FULL)
    )
    assert found is not None
    assert found.predicted.tolist() == [0, 1, 1]  # 4 and 4: the first of equal ones
    ours, full = [[distribution(x) for x in states] for states in (STATES, FULL)]
    picked = [math.log(p[t]) for p, t in zip(ours, TARGETS, strict=True)]
    np.testing.assert_allclose(found.logprobs, picked, atol=1e-6)
    overlap = [sum(map(min, p, q)) for p, q in zip(ours, full, strict=True)]
    np.testing.assert_allclose(found.overlap, overlap, atol=1e-6)
    divergence = [
        sum(q * math.log(q / p) for p, q in zip(*pair, strict=True))
        for pair in zip(ours, full, strict=True)
    ]
    np.testing.assert_allclose(found.divergence, divergence, atol=1e-6)
    assert found.divergence is not None
    assert found.divergence[0] == 0


def test_without_a_reference_there_is_nothing_to_compare() -> None:
    found = score_answers(logits, torch.tensor(STATES), torch.tensor(TARGETS), 3)
    assert found is not None
    assert found.overlap is None
    assert found.divergence is None
    full = score_answers(logits, torch.tensor(STATES), torch.tensor(TARGETS), 3, torch.tensor(FULL))
    assert full is not None
    np.testing.assert_allclose(found.logprobs, full.logprobs, atol=1e-6)


def test_numbers_that_are_not_finite_stay_visible() -> None:
    states = torch.tensor([[math.nan, 0.0]])
    found = score_answers(logits, states, torch.tensor([0]), 3)
    assert found is not None
    assert np.isnan(found.logprobs).all()


def test_a_rank_without_logits_takes_part_in_every_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_scoring, "LOGIT_BYTES", 4 * 3)
    pieces = []

    def nothing(states: torch.Tensor) -> None:
        pieces.append(len(states))

    assert score_answers(nothing, torch.tensor(STATES), torch.tensor(TARGETS), 3) is None
    assert pieces == [1, 1, 1]
