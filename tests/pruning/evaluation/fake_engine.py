"""An ``Engine`` that knows by heart what each plan answers: a script instead of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.plan import Plan

Tokens = tuple[int, ...]
OTHER = 7
"""The token given where the script has ended or been left."""


@dataclass
class FakeEngine:
    """Greedy answers by plan and prompt; each scripted token has probability ``sure``.

    All other tokens of the vocabulary share the rest equally. Off the script, ``OTHER`` is sure.
    """

    answers: Mapping[Plan | None, Mapping[Tokens, Tokens]]
    vocabulary: int = 600
    sure: Mapping[Plan | None, float] = field(default_factory=dict)
    broken: frozenset[Plan] = frozenset()
    """Plans whose numbers are NaN."""
    calls: list[tuple[str, int, int]] = field(default_factory=list)
    """(method, number of plans, number of rows) of each call."""

    def probabilities(self, plan: Plan | None, prompt: Tokens, given: Tokens) -> np.ndarray:
        script = self.answers[plan][prompt]
        on_script = len(given) < len(script) and script[: len(given)] == given
        sure = self.sure.get(plan, 0.9)
        result = np.full(self.vocabulary, (1 - sure) / (self.vocabulary - 1))
        result[script[len(given)] if on_script else OTHER] = sure
        return result

    def score(
        self,
        plans: Sequence[Plan | None],
        rows: Sequence[TokenRow],
        *,
        against_full: bool = False,
    ) -> list[AnswerScores]:
        self.calls.append(("score", len(plans), len(rows)))
        return [self._scores(plan, rows, against_full=against_full) for plan in plans]

    def _scores(
        self, plan: Plan | None, rows: Sequence[TokenRow], *, against_full: bool
    ) -> AnswerScores:
        places = [(row, i) for row in rows for i in range(len(row.answer))]
        given = [self.probabilities(plan, row.prompt, row.answer[:i]) for row, i in places]
        logprobs = np.log([p[row.answer[i]] for p, (row, i) in zip(given, places, strict=True)])
        if plan in self.broken:
            logprobs = np.full(len(places), np.nan)
        overlap = divergence = None
        if against_full:
            full = [self.probabilities(None, row.prompt, row.answer[:i]) for row, i in places]
            pairs = list(zip(full, given, strict=True))
            overlap = np.array([np.minimum(f, p).sum() for f, p in pairs])
            divergence = np.array([(f * np.log(f / p)).sum() for f, p in pairs])
        predicted = np.array([p.argmax() for p in given])
        return AnswerScores(predicted, logprobs, overlap, divergence)

    def generate(
        self,
        plans: Sequence[Plan | None],
        prompts: Sequence[Tokens],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[list[Tokens]]:
        self.calls.append(("generate", len(plans), len(prompts)))
        return [[self._answer(plan, x, max_tokens, end) for x in prompts] for plan in plans]

    def _answer(
        self, plan: Plan | None, prompt: Tokens, max_tokens: int, end: Collection[int]
    ) -> Tokens:
        given: Tokens = ()
        while len(given) < max_tokens and not (given and given[-1] in end):
            given = (*given, int(self.probabilities(plan, prompt, given).argmax()))
        return given
