"""What an evaluation asks of an engine: score given answers under plans, or generate under them.

``pruning`` defines the protocol and knows nothing of who answers: vLLM in this process, a running
server, or transformers, the reference.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from liveprune.pruning.plan import Plan

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TokenRow:
    """One question with the answer whose tokens are scored; neither is empty."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """The token that ends it is its last, where the measure wants the end scored too."""

    @property
    def text(self) -> tuple[int, ...]:
        """What a model reads to predict the answer: all but the answer's last token."""
        return (*self.prompt, *self.answer[:-1])


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """What one plan makes of all answers: one entry per answer token, rows one after another."""

    predicted: npt.NDArray[np.int64]
    """The token that greedy decoding would give after the right ones before it."""
    logprobs: Vector
    """Natural logarithm of the answer token's probability."""
    overlap: Vector | None = None
    """Sum over the vocabulary of min(full model's, plan's probability): 1 - total variation."""
    divergence: Vector | None = None
    """Kullback-Leibler divergence of the plan's distribution from the full model's, nats."""


class Engine(Protocol):
    """Scores and generates under plans. A plan None is the full model.

    One call may hold any number of plans: the engine splits what does not fit. Calls are not
    concurrent. A call that fails as a whole raises; the caller finds the plan to blame by asking
    for one at a time.
    """

    def score(
        self,
        plans: Sequence[Plan | None],
        rows: Sequence[TokenRow],
        *,
        against_full: bool = False,
    ) -> list[AnswerScores]:
        """Score the rows' answers, teacher-forced, under each plan.

        Args:
            plans: of the engine's base model.
            rows: the same for all plans.
            against_full: also compare each distribution with the full model's.

        Returns:
            One for each plan. Values that are not finite are returned as they are.

        Raises:
            EngineError: a plan cannot be run, or the engine failed.
        """

    def generate(
        self,
        plans: Sequence[Plan | None],
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[list[tuple[int, ...]]]:
        """Decode greedily under each plan.

        Args:
            plans: of the engine's base model.
            prompts: token ids, the same for all plans.
            max_tokens: most tokens of an answer.
            end: token ids that end an answer; such a token stays its last.

        Returns:
            For each plan the answers to all prompts.

        Raises:
            EngineError: a plan cannot be run, or the engine failed.
        """
