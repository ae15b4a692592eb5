"""Plans of a search on the running engine: live for a moment, under no name, below user traffic.

One call is one operation as far as other operations are concerned, but it gives way to them: what
it made live is taken out again, and the caller asks anew. Within it one plan after another is made
live as any variant is, so slots, rows, memory target and invariant are those of variants.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from liveprune.patches.live_types import Served
from liveprune.pruning.errors import ConflictError, DataError, EngineError, LiveprunError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_guards import check_plan
from liveprune.server.change import Change
from liveprune.server.operation_runner import OperationRunner
from liveprune.server.operations import Operation, State
from liveprune.server.registry import Registry
from liveprune.server.swap import Swapper, uninterrupted
from liveprune.server.swap_steps import Steps
from liveprune.server.variant import FULL, Variant

T = TypeVar("T")
Work = Callable[[Served], Coroutine[Any, Any, T]]

TIDY_SECONDS = 300.0

logger = logging.getLogger("liveprune")


class LiveCandidates:
    """Tries plans out, over one engine; fulfils ``control_plane.Candidates``."""

    def __init__(self, steps: Steps, swapper: Swapper, runner: OperationRunner) -> None:
        self._steps = steps
        self._registry: Registry = steps.registry
        self._engine = steps.engine
        self._swapper = swapper
        self._runner = runner
        self._closed = ""

    def check(self) -> None:
        """See ``control_plane.Candidates.check``."""
        self._engine.check_background()

    @property
    def closed(self) -> bool:
        """Between ``close`` and ``open``."""
        return bool(self._closed)

    def open(self) -> None:
        """Let plans be tried out."""
        self._closed = ""

    async def close(self, reason: str) -> None:
        """Refuse to try plans out until ``open``, and interrupt who does."""
        self._closed = reason
        await self._runner.make_way()

    async def interrupt(self) -> None:
        """End what nobody waits for any more."""
        await self._runner.make_way()

    async def score(
        self,
        plans: Sequence[Plan | None],
        rows: Sequence[TokenRow],
        *,
        against_full: bool = False,
        reference: Plan | None = None,
    ) -> list[AnswerScores | LiveprunError]:
        """See ``control_plane.Candidates.score``; ``reference`` stands for the full model there."""
        self._check_tokens(token for row in rows for token in (*row.prompt, *row.answer))
        engine = self._engine
        return await self._evaluate(
            "score",
            plans,
            lambda served: engine.score(served, rows, against_full=against_full),
            (lambda served: engine.keep_reference(served, rows)) if against_full else None,
            reference,
        )

    async def generate(
        self,
        plans: Sequence[Plan | None],
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[list[tuple[int, ...]] | LiveprunError]:
        """See ``control_plane.Candidates.generate``."""
        self._check_tokens(token for prompt in prompts for token in prompt)
        engine = self._engine
        return await self._evaluate(
            "generate",
            plans,
            lambda served: engine.generate(served, prompts, max_tokens=max_tokens, end=end),
        )

    async def _evaluate(
        self,
        kind: str,
        plans: Sequence[Plan | None],
        work: Work[T],
        first: Work[None] | None = None,
        reference: Plan | None = None,
    ) -> list[T | LiveprunError]:
        """``first``: work with the reference (None: the full model) that comes before."""
        self._engine.check_background()
        if self._closed:
            raise ConflictError(f"{kind}: {self._closed}")
        session = self._change(Operation(kind, f"{len(plans)} candidates"), None)

        async def run() -> list[T | LiveprunError]:
            try:
                if first is not None:
                    await self._swapper.try_out(self._change(session.operation, reference), first)
                return [await self._try_out(session.operation, plan, work) for plan in plans]
            finally:
                await uninterrupted(self._tidy())

        return await self._runner.evaluate(session, run())

    async def _try_out(
        self, operation: Operation, plan: Plan | None, work: Work[T]
    ) -> T | LiveprunError:
        """What the work found; or the error, where the plan is to blame.

        Raises:
            LiveprunError: others are.
        """
        change = self._change(operation, plan)
        operation.state = State.QUEUED
        try:
            if plan is not None:
                # In a thread: large merges take a while, and this one streams tokens.
                await asyncio.to_thread(check_plan, plan, self._registry.spec)
            return await self._swapper.try_out(change, work)
        except LiveprunError as error:
            if operation.state is State.SCORING:
                raise
            if not change.undone:
                raise EngineError(f"{error}; {'; '.join(operation.notes)}") from error
            return error

    def _change(self, operation: Operation, plan: Plan | None) -> Change:
        """Of a plan that is live already (None: the full model), its own publication is used."""
        registry = self._registry
        digest = None if plan is None else plan.digest
        live = next((p for p in registry.live.values() if p.variant.digest == digest), None)
        variant = Variant(FULL if plan is None else "candidate", plan)
        return Change(
            operation,
            variant,
            alias=registry.alias,
            previous=registry.previous,
            new=live,
            candidate=True,
        )

    async def _tidy(self) -> None:
        """Forget what was collected, and give rows and room back."""
        for undo in (self._engine.forget_scores, self._steps.give_room_back):
            await _attempt(undo())

    def _check_tokens(self, tokens: Iterable[int]) -> None:
        """Before a kernel meets them: some look up what is not there."""
        vocabulary = int(self._registry.spec.config["vocab_size"])
        bad = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if bad is not None:
            raise DataError(f"rows: found the token {bad}, expected 0 to {vocabulary - 1}")


async def _attempt(undo: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(TIDY_SECONDS):
            await undo
    except (LiveprunError, TimeoutError) as error:
        # The answers are there; the next call, or operation, does the same first.
        logger.warning("candidates: not tidied up, tried again later: %s", error)
