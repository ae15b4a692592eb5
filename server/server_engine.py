"""A running server as the engine of a search: its admin API tries the plans out.

Candidates run below the traffic of its users, and give way to operations on its variants; what
was interrupted is asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.errors import EngineError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.plan import Plan
from liveprune.server.admin_client import AdminClient, AdminConflictError
from liveprune.server.candidate_models import (
    MAX_PLANS,
    MAX_ROWS,
    Generate,
    GenerateAnswer,
    PlanBody,
    RowBody,
    Score,
    ScoreAnswer,
)

T = TypeVar("T")
Answer = TypeVar("Answer", bound=BaseModel)

TOKENS = 1 << 16
"""Of one call, where a row alone is not longer: some seconds of work, so that little is lost when
it must give way."""
PATIENCE = 1800.0
"""Seconds that operations of others may keep one call waiting."""
PAUSES = (0.2, 5.0)
"""Seconds between attempts: at first, doubled each time, and at most."""


class ServerEngine:
    """Fulfils ``pruning.evaluation.engine.Engine``; use it as a context manager."""

    def __init__(
        self,
        url: str,
        key: str,
        model: Path,
        *,
        key_source: str = "",
        patience: float = PATIENCE,
        tokens: int = TOKENS,
    ) -> None:
        """Connect, and check what it serves.

        Args:
            url: of its admin API.
            key: of its admin API.
            model: checkpoint folder that the plans are for, as this machine sees it.
            key_source: says in errors where the key was found.
            patience: seconds that operations of others may keep one call waiting.
            tokens: of one call, where a row alone is not longer.

        Raises:
            EngineError: it is not reachable, serves another model, or has no live variants.
            CheckpointError: ``model`` is unreadable.
        """
        self._patience, self._tokens = patience, tokens
        expected = fingerprint_model(model)
        self._client = AdminClient(url, key, key_source=key_source)
        try:
            self._check(self._client.status(), url, model, expected)
        except BaseException:
            self.close()
            raise

    def score(
        self,
        plans: Sequence[Plan | None],
        rows: Sequence[TokenRow],
        *,
        against_full: bool = False,
    ) -> list[AnswerScores]:
        parts: list[list[AnswerScores]] = [[] for _ in plans]
        pieces = list(_pieces(rows, lambda row: len(row.prompt) + len(row.answer), self._tokens))
        for piece in pieces:
            bodies = [RowBody(prompt=list(x.prompt), answer=list(x.answer)) for x in piece]
            tokens = sum(len(row.prompt) + len(row.answer) for row in piece)
            for start, some in _groups(plans, tokens, self._tokens):
                body = Score(plans=some, rows=bodies, against_full=against_full)
                answer = self._ask(self._client.score, body, ScoreAnswer)
                found = _checked(answer.scores, len(some))
                for i, scores in enumerate(found, start):
                    parts[i].append(scores.scores())
        return [_joined(scores) for scores in parts]

    def generate(
        self,
        plans: Sequence[Plan | None],
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[list[tuple[int, ...]]]:
        answers: list[list[tuple[int, ...]]] = [[] for _ in plans]
        for piece in _pieces(prompts, lambda prompt: len(prompt) + max_tokens, self._tokens):
            tokens = sum(len(prompt) + max_tokens for prompt in piece)
            for start, some in _groups(plans, tokens, self._tokens):
                body = Generate(
                    plans=some,
                    prompts=[list(prompt) for prompt in piece],
                    max_tokens=max_tokens,
                    end=sorted(end),
                )
                answer = self._ask(self._client.generate, body, GenerateAnswer)
                for i, found in enumerate(_checked(answer.generated, len(some)), start):
                    answers[i] += [tuple(tokens) for tokens in found.answers or ()]
        return answers

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check(self, status: dict[str, Any], url: str, model: Path, expected: str) -> None:
        found = status.get("fingerprint")
        if not found:
            raise EngineError(
                f"{url}: {status['model']!r} runs without live variants (rebuild mode), expected "
                f"a server that can try plans out"
            )
        if found != expected:
            raise EngineError(
                f"{url}: serves {status['model']!r} with the fingerprint {found}, expected "
                f"{expected} of {model}: plans are for one base model"
            )

    def _ask(
        self, call: Callable[[dict[str, Any]], Any], body: BaseModel, answer: type[Answer]
    ) -> Answer:
        """Ask until no operation is in the way."""
        deadline, (pause, longest) = time.monotonic() + self._patience, PAUSES
        form = body.model_dump(mode="json")
        while True:
            try:
                return answer.model_validate(call(form))
            except AdminConflictError:
                if time.monotonic() + pause > deadline:
                    raise
            except ValidationError as error:
                raise EngineError(f"found an answer of another form: {error}") from error
            time.sleep(pause)
            pause = min(2 * pause, longest)


def _pieces(items: Sequence[T], tokens: Callable[[T], int], most: int) -> Iterator[Sequence[T]]:
    """Consecutive items that one call can hold."""
    start = held = 0
    for i, item in enumerate(items):
        own = tokens(item)
        if i > start and (held + own > most or i - start == MAX_ROWS):
            yield items[start:i]
            start, held = i, 0
        held += own
    if items:
        yield items[start:]


def _groups(
    plans: Sequence[Plan | None], tokens: int, most: int
) -> Iterator[tuple[int, list[PlanBody | None]]]:
    """Plans that one call can hold with so many tokens each, and the place of the first."""
    size = min(MAX_PLANS, max(1, most // tokens))
    for start in range(0, len(plans), size):
        some = plans[start : start + size]
        yield start, [None if plan is None else PlanBody.of(plan) for plan in some]


def _checked(found: Sequence[Any], plans: int) -> Sequence[Any]:
    """As many answers as plans, none an error.

    Raises:
        EngineError: otherwise.
    """
    if len(found) != plans:
        raise EngineError(f"found answers for {len(found)} plans, expected {plans}")
    for one in found:
        if one.error is not None:
            raise EngineError(one.error)
    return found


def _joined(parts: Sequence[AnswerScores]) -> AnswerScores:
    def column(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if any(x is None for x in values) else np.concatenate(values)

    return AnswerScores(
        column("predicted"), column("logprobs"), column("overlap"), column("divergence")
    )
