"""A task: rows and a measure, asked of an engine for any plans and any of the rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from liveprune.pruning.errors import DataError, EngineError
from liveprune.pruning.evaluation.engine import AnswerScores, Engine, TokenRow
from liveprune.pruning.evaluation.measures import (
    Measure,
    agreement,
    choice_values,
    first_miss,
    may_recover,
    measure_of,
)
from liveprune.pruning.evaluation.rows import Question, Questions, Tokens, load_questions
from liveprune.pruning.plan import Plan

Values = npt.NDArray[np.float64]

MAX_ANSWER_TOKENS = 64
"""Default number of tokens after which a generated answer is cut off."""


def load_task(
    path: Path,
    model: Path,
    *,
    measure: str,
    max_rows: int | None = None,
    max_tokens: int | None = None,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    chat: bool = False,
) -> Task:
    """Read the rows of a task from a JSONL file (``rows``) and check all of them.

    Args:
        path: the rows.
        model: the base model's folder, for its tokenizer and configs.
        measure: one of ``MEASURES``.
        max_rows: rows read from the top; None reads all.
        max_tokens: most tokens of a prompt with its answer; None takes the model's own limit.
        max_answer_tokens: most tokens of a generated answer, its end included.
        chat: put prompts through the chat template, each as one user's turn.

    Raises:
        DataError: the measure is unknown, or a row does not fit it: naming the file and the
            line, what was found and what was expected.
        CheckpointError: ``model`` has no readable config.
    """
    needs = measure_of(measure)
    for name, value in (("max_tokens", max_tokens), ("max_answer_tokens", max_answer_tokens)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}, expected at least 1")
    questions = load_questions(path, model, form=needs.form, max_rows=max_rows, chat=chat)
    limit = min(max_tokens or questions.max_tokens, questions.max_tokens)
    if measure == "exact":
        _check_exact(questions, path, max_answer_tokens)
    for row in questions.rows:
        room = _room(row, needs, max_answer_tokens)
        if len(row.prompt) + room > limit:
            raise DataError(
                f"{row.where}: found {len(row.prompt)} tokens in the prompt and up to {room} in "
                f"the answer, expected at most {limit} together"
            )
    return Task(measure, questions, max_answer_tokens)


def _room(row: Question, needs: Measure, max_answer_tokens: int) -> int:
    """Tokens that an answer of the row may take."""
    return max_answer_tokens if needs.generates else max(map(len, row.answers), default=0)


def _check_exact(questions: Questions, path: Path, max_answer_tokens: int) -> None:
    if not questions.end:
        raise DataError(
            f"{path}: the model names no end token (eos_token_id), expected one for exact match"
        )
    for row in questions.rows:
        gold = row.answers[0]
        if len(gold) >= max_answer_tokens:
            raise DataError(
                f"{row.where}: found an answer of {len(gold)} tokens and its end, expected at "
                f"most {max_answer_tokens} together (max_answer_tokens)"
            )
        if set(gold) & set(questions.end):
            raise DataError(f"{row.where}: found an end token inside the answer, expected none")


class Task:
    """Rows and a measure. Not for concurrent use."""

    def __init__(self, measure: str, questions: Questions, max_answer_tokens: int) -> None:
        """Take rows that ``load_task`` has checked."""
        self.measure = measure
        self._needs: Measure = measure_of(measure)
        self._questions = questions
        self._max_answer_tokens = max_answer_tokens
        self._answered: tuple[Engine, list[TokenRow]] | None = None

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self._questions.rows)

    @property
    def prompts(self) -> list[Tokens]:
        """Token ids of every row's prompt."""
        return [row.prompt for row in self._questions.rows]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer, given or generated."""
        return max(
            len(row.prompt) + _room(row, self._needs, self._max_answer_tokens)
            for row in self._questions.rows
        )

    @property
    def binary(self) -> bool:
        """Every value is 0 or 1."""
        return self._needs.binary

    @cached_property
    def digest(self) -> str:
        """Content digest, 32 hex digits: tokens of the rows, the measure and its parameters."""
        content = [self._questions.digest, self.measure, self._max_answer_tokens]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    def values(
        self,
        engine: Engine,
        plans: Sequence[Plan | None],
        rows: Sequence[int] | None = None,
    ) -> Values:
        """Measure plans on rows, in one call of the engine where the measure allows.

        Without labels, the first call makes the full model answer all rows, once per engine.

        Args:
            engine: asked for all plans and rows together.
            plans: of the engine's base model; None is the full model.
            rows: which rows, counted from 0; None takes all.

        Returns:
            [plans, rows] float64 in [0, 1], larger is better; NaN where a plan's numbers for a
            row are not finite.

        Raises:
            EngineError: a plan cannot be run, or the engine failed.
        """
        asked = range(self.size) if rows is None else rows
        if not plans or not len(asked):
            return np.empty((len(plans), len(asked)))
        chosen = [self._questions.rows[i] for i in asked]
        if self.measure == "exact":
            return self._exact(engine, plans, chosen)
        if self.measure == "contains":
            return self._contains(engine, plans, chosen)
        if self.measure == "choice":
            scores = _score(engine, plans, _choice_rows(chosen), against_full=False)
            return np.stack([choice_values(x.logprobs, chosen) for x in scores])
        return self._agreement(engine, plans, asked)

    def answer_tokens(self, rows: Sequence[int] | None = None) -> int:
        """Answer tokens that one plan is scored on: what a value costs beside the prompts.

        The generated answers of ``contains``, and those of the label-free measures before the
        full model has given them, count as ``max_answer_tokens`` each.
        """
        asked = range(self.size) if rows is None else rows
        chosen = [self._questions.rows[i] for i in asked]
        if self.measure == "exact":
            return sum(len(row.answers[0]) + 1 for row in chosen)
        if self.measure == "choice":
            return sum(len(answer) for row in chosen for answer in row.answers)
        if self._answered is None:
            return self._max_answer_tokens * len(asked)
        return sum(len(self._answered[1][i].answer) for i in asked)

    def _exact(
        self, engine: Engine, plans: Sequence[Plan | None], rows: Sequence[Question]
    ) -> Values:
        """Teacher-forced: the answer is decoded greedily if each of its tokens is the likeliest.

        Other tokens can decode to the same text; only rows where that is still possible after
        the first miss are generated, from there on.
        """
        end = self._questions.end
        asked = [TokenRow(row.prompt, (*row.answers[0], end[0])) for row in rows]
        scores = _score(engine, plans, asked, against_full=False)
        starts = np.cumsum([0, *(len(row.answer) for row in asked)])
        values = np.zeros((len(plans), len(rows)))
        for p, (plan, score) in enumerate(zip(plans, scores, strict=True)):
            unsure = []
            for r, row in enumerate(asked):
                place = slice(int(starts[r]), int(starts[r + 1]))
                predicted, logprobs = score.predicted[place], score.logprobs[place]
                if np.isnan(logprobs).any():
                    values[p, r] = np.nan
                elif (miss := first_miss(predicted, row.answer, end)) is None:
                    values[p, r] = 1.0
                else:
                    given = (*row.answer[:miss], int(predicted[miss]))
                    if given[-1] in end:
                        values[p, r] = float(self._text(given) == rows[r].text)
                    elif may_recover(self._text(given), rows[r].text):
                        unsure.append(r)
            if unsure:
                prompts = [rows[r].prompt for r in unsure]
                answers = self._generate(engine, [plan], prompts)[0]
                for r, answer in zip(unsure, answers, strict=True):
                    ended = answer[-1] in end
                    values[p, r] = float(ended and self._text(answer) == rows[r].text)
        return values

    def _contains(
        self, engine: Engine, plans: Sequence[Plan | None], rows: Sequence[Question]
    ) -> Values:
        answers = self._generate(engine, plans, [row.prompt for row in rows])
        return np.array(
            [
                [
                    float(row.text in self._questions.decode(tokens))
                    for row, tokens in zip(rows, of_plan, strict=True)
                ]
                for of_plan in answers
            ]
        )

    def _agreement(
        self, engine: Engine, plans: Sequence[Plan | None], asked: Sequence[int]
    ) -> Values:
        answered = self._full_answers(engine)
        rows = [answered[i] for i in asked]
        lengths = [len(row.answer) for row in rows]
        scores = _score(engine, plans, rows, against_full=self._needs.against_full)
        values = []
        for score in scores:
            by_measure = {"esap": score.overlap, "kl": score.divergence, "nll": score.logprobs}
            numbers = by_measure[self.measure]
            if numbers is None:
                raise EngineError(
                    f"{self.measure}: the engine compared nothing with the full model"
                )
            values.append(agreement(self.measure, numbers, lengths))
        return np.stack(values)

    def _full_answers(self, engine: Engine) -> list[TokenRow]:
        if self._answered is None or self._answered[0] is not engine:
            answers = self._generate(engine, [None], self.prompts)[0]
            rows = [TokenRow(p, a) for p, a in zip(self.prompts, answers, strict=True)]
            self._answered = (engine, rows)
        return self._answered[1]

    def _generate(
        self, engine: Engine, plans: Sequence[Plan | None], prompts: Sequence[Tokens]
    ) -> list[list[Tokens]]:
        return engine.generate(
            plans, prompts, max_tokens=self._max_answer_tokens, end=self._questions.end
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return self._questions.decode(tokens).strip()


def _choice_rows(rows: Sequence[Question]) -> list[TokenRow]:
    return [TokenRow(row.prompt, answer) for row in rows for answer in row.answers]


def _score(
    engine: Engine,
    plans: Sequence[Plan | None],
    rows: Sequence[TokenRow],
    *,
    against_full: bool,
) -> list[AnswerScores]:
    """Ask the engine once; refuse an answer that is not one entry per plan and token."""
    scores = engine.score(plans, rows, against_full=against_full)
    tokens = sum(len(row.answer) for row in rows)
    found = [len(x.logprobs) for x in scores]
    if found != [tokens] * len(plans):
        raise EngineError(
            f"score: found {found} tokens scored, expected {tokens} for each of {len(plans)} plans"
        )
    return scores
