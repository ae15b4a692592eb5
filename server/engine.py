"""The running engine as the server sees it: a small protocol of our own.

``patches/live_engine.py`` fulfils it with vLLM; tests fulfil it with a fake.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from liveprune.patches.live_counts import VariantCounts
from liveprune.patches.live_types import (
    EngineMemory,
    FillProgress,
    GoldenAnswer,
    KVStatus,
    Served,
)
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow


class LiveEngine(Protocol):
    """One engine with routing tables; a slot holds the tables of one variant.

    Slot 0 is the base model: its plan is None. Every method raises EngineError when the engine
    refuses or fails, and never leaves a live slot changed.
    """

    @property
    def slots(self) -> int:
        """Slots there are, the base's included."""

    async def prepare(self, slot: int, plan: Path | None) -> None:
        """Start to make every row resident that the plan needs, and to verify them (background).

        ``plan`` is a plan file of our own form that the workers can read; None: the base model.
        Raises at once if the plan does not fit the model or the spare rows do not suffice.
        """

    async def progress(self, slot: int) -> FillProgress:
        """How far ``prepare`` is."""

    async def cancel(self, slot: int) -> None:
        """Give up a slot that was prepared and never published, or whose filling runs or failed.

        Does nothing if the slot is free; rows that it alone needed go with the next ``release``.
        """

    async def publish(self, slot: int) -> None:
        """Make a prepared slot live, between two steps of the engine.

        Raises unless its rows are resident and verified.
        """

    async def retire(self, slot: int) -> bool:
        """Make a slot no longer live; False (and nothing happens) while requests use it.

        Its rows stay until ``release``.
        """

    async def release(self) -> int:
        """Give back rows that no live or prepared slot needs; returns bytes, 0 when none is left.

        One call gives back a bounded amount, so that no step of the engine waits long.
        """

    async def golden(
        self, variant: Served, prompts: Sequence[Sequence[int]], tokens: int
    ) -> list[GoldenAnswer]:
        """Answer the canary prompts (token ids) greedily with a live slot, past the front door.

        Must not read the prefix cache: it checks the weights that are there now.
        """

    def check_background(self) -> None:
        """Refuse where requests cannot be served below those of users.

        Raises:
            IncompatibleEnvironmentError: naming the flag that would allow it.
        """

    async def keep_reference(self, full: Served, rows: Sequence[TokenRow]) -> None:
        """Run the rows under the live full model, for ``score`` to compare with."""

    async def score(
        self, variant: Served, rows: Sequence[TokenRow], *, against_full: bool
    ) -> AnswerScores:
        """Score the rows' answers under a live slot, below user traffic.

        ``against_full``: also compare with what ``keep_reference`` has kept of the same rows.
        """

    async def forget_scores(self) -> None:
        """Let go of all that ``keep_reference``, or a ``score`` that was interrupted, has kept."""

    async def generate(
        self,
        variant: Served,
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[tuple[int, ...]]:
        """Decode greedily under a live slot, below user traffic; see ``Engine.generate``."""

    async def statistics(self) -> Mapping[str, VariantCounts]:
        """What users' tokens were routed to since the engine's start, by plan digest or ``base``.

        Raises EngineError where the engine does not count.
        """

    async def memory(self) -> EngineMemory:
        """What the weights take."""

    async def kv(self) -> KVStatus:
        """What the KV cache takes."""

    async def resize_kv(self, blocks: int) -> KVStatus:
        """Grow the KV cache to ``blocks``, or shrink it towards them: free blocks first.

        Shrinking gives back only free blocks; call again until ``blocks`` says it is done.
        """
