"""Live fidelity: some answers of an experiment's arms, scored again under the reference.

Teacher-forced: prompt and answer are read once under the variant that answered and once under the
reference, and the two distributions compared at each token of the answer. The reference is the full
model where it is live, else the control arm's variant. It is background work: below users' traffic,
through the gate of candidates, stopped by the same switch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from liveprune.pruning.errors import (
    ConflictError,
    EngineError,
    IncompatibleEnvironmentError,
    LiveprunError,
)
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.server.candidates import LiveCandidates
from liveprune.server.experiments.live import Assignment, LiveExperiments
from liveprune.server.registry import Registry
from liveprune.server.running_task import running_task
from liveprune.server.variant import FULL

WAITING = 256
"""Answers that wait to be scored, at most; the oldest go first."""
BATCH = 8
LONGEST = 4096
"""Tokens of a prompt with its answer; longer ones are not drawn."""
ANSWER = 512
"""Tokens of an answer that are scored, from its beginning."""
RETRY_SECONDS = 2.0
SAME = {"agreement": 1.0, "top1_agreement": 1.0, "kl": 0.0, "log_likelihood_gap": 0.0}
"""What the reference makes of its own answers."""

logger = logging.getLogger("liveprune.experiments")


@dataclass(frozen=True)
class _Answer:
    assignment: Assignment
    tag: str
    """Of the variant that gave it."""
    row: TokenRow


class Fidelity:
    """Lives in the event loop of the API server; ``offer`` is called for every finished answer."""

    def __init__(
        self,
        candidates: Callable[[], LiveCandidates],
        registry: Registry,
        experiments: LiveExperiments,
        draw: Callable[[], float] | None = None,
    ) -> None:
        """``candidates``: raises ConflictError while variants are being restored."""
        self._candidates, self._registry, self._experiments = candidates, registry, experiments
        self._draw = draw or random.SystemRandom().random
        self._waiting: deque[_Answer] = deque(maxlen=WAITING)
        self._some = asyncio.Event()
        self.off = ""
        """Why this engine cannot do it at all."""

    def offer(self, assignment: Assignment, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Draw whether an answer is scored again; ``prompt`` and ``answer`` are token ids."""
        if self.off or not assignment.counted or self._draw() >= assignment.fidelity:
            return
        scored = tuple(answer[:ANSWER])
        if not prompt or not scored or len(prompt) + len(scored) > LONGEST:
            return
        tag = assignment.shadow or assignment.variant
        self._waiting.append(_Answer(assignment, tag, TokenRow(tuple(prompt), scored)))
        self._some.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Score until the block is left."""
        async with running_task(self._run(), "fidelity"):
            yield

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            batch = self._take()
            if not batch:
                self._some.clear()
                continue
            try:
                await self._score(batch)
            except ConflictError:  # a swap, a job's candidate, or background work is off
                self._waiting.extendleft(reversed(batch))
                await asyncio.sleep(RETRY_SECONDS)
            except IncompatibleEnvironmentError as error:
                self.off = str(error)
                logger.warning("answers are not scored again: %s", error)
                self._waiting.clear()
            except LiveprunError as error:
                logger.warning("%d answers could not be scored again: %s", len(batch), error)

    def _take(self) -> list[_Answer]:
        """The oldest that waits, and others of its experiment and variant."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        key = (first.assignment.experiment, first.tag)
        batch = [x for x in self._waiting if (x.assignment.experiment, x.tag) == key][:BATCH]
        for answer in batch:
            self._waiting.remove(answer)
        return batch

    async def _score(self, batch: Sequence[_Answer]) -> None:
        """Raises LiveprunError where nothing could be scored."""
        live, tag = self._registry.live, batch[0].tag
        reference = FULL
        if FULL not in live:
            control = self._experiments.control_of(batch[0].assignment.experiment)
            if control is None:  # the experiment has ended
                return
            reference = control
        if tag == reference:
            for answer in batch:
                self._experiments.finished(answer.assignment, SAME)
            return
        if tag not in live or reference not in live:
            raise EngineError(f"found {sorted(live)} live, expected {reference} and {tag}")
        plans = [live[name].variant.plan for name in (reference, tag)]
        rows = [answer.row for answer in batch]
        found = await self._candidates().score(plans, rows, against_full=True, reference=plans[0])
        first, second = (_whole(x) for x in found)
        begin = 0
        for answer in batch:
            part = slice(begin, begin + len(answer.row.answer))
            begin = part.stop
            values = _compared(first, second, part)
            if values is not None:
                self._experiments.finished(answer.assignment, values)


def _whole(found: AnswerScores | LiveprunError) -> AnswerScores:
    if isinstance(found, LiveprunError):
        raise found
    return found


def _compared(
    reference: AnswerScores, variant: AnswerScores, part: slice
) -> dict[str, float] | None:
    """The metrics of one answer; None if a value is not finite."""
    if variant.overlap is None or variant.divergence is None:
        raise EngineError("scores: found no comparison with the reference, expected one")
    with np.errstate(invalid="ignore"):  # infinities are looked for below
        gap = reference.logprobs[part] - variant.logprobs[part]
    values = {
        "agreement": float(np.mean(variant.overlap[part])),
        "top1_agreement": float(np.mean(reference.predicted[part] == variant.predicted[part])),
        "kl": float(np.mean(variant.divergence[part])),
        "log_likelihood_gap": float(np.mean(gap)),
    }
    if not np.isfinite(list(values.values())).all():
        return None
    # Sums of float32 probabilities pass 1 by their rounding.
    return values | {"agreement": min(max(values["agreement"], 0.0), 1.0)}
