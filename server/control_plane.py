"""What the admin API, and the metrics, need of the live variants: a small protocol."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from liveprune.pruning.errors import LiveprunError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.plan import Plan
from liveprune.server.layer_views import LayerView
from liveprune.server.operations import Operation, Status, VariantView


class Candidates(Protocol):
    """Plans that are tried out on the running engine; nobody else sees them."""

    def check(self) -> None:
        """Raise IncompatibleEnvironmentError where the engine cannot do this at all."""

    async def score(
        self, plans: Sequence[Plan | None], rows: Sequence[TokenRow], *, against_full: bool
    ) -> list[AnswerScores | LiveprunError]:
        """Score answers under plans; an error is that plan's own.

        Raises ConflictError also where another operation interrupted it, and
        IncompatibleEnvironmentError where the engine cannot do this at all.
        """

    async def generate(
        self,
        plans: Sequence[Plan | None],
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[list[tuple[int, ...]] | LiveprunError]:
        """Decode greedily under plans; as ``score``."""


class ControlPlane(Protocol):
    """What the admin API needs of the live variants.

    Raises VariantError (unknown, taken, or cannot be live), ConflictError (not now), PlanError,
    CheckpointError and EngineError. A mutation with an idempotency key that was seen before returns
    the operation of then.
    """

    @property
    def golden_mismatches(self) -> int:
        """Times that golden answers differed; never falls."""

    @property
    def candidates(self) -> Candidates:
        """Raises IncompatibleEnvironmentError where plans cannot be tried out at all."""

    async def add(
        self, tag: str, plan: Path, /, *, idempotency_key: str | None = None
    ) -> Operation:
        """Start to make ``plan`` live as ``tag``."""

    async def remove(self, tag: str, /, *, idempotency_key: str | None = None) -> Operation:
        """Start to take a variant out of service."""

    async def swap(
        self, tag: str, /, *, keep_previous: bool = False, idempotency_key: str | None = None
    ) -> Operation:
        """Start to send the alias's requests to ``tag``, and to release what only the old needs."""

    async def rollback(self, *, idempotency_key: str | None = None) -> Operation:
        """Start to swap back to the variant before."""

    async def cancel(self, operation_id: str, /) -> Operation:
        """Give up an operation that has not switched yet."""

    async def variants(self) -> list[VariantView]:
        """All variants, ``full`` included."""

    async def layers(self, tag: str, /) -> Sequence[LayerView]:
        """What a variant leaves of each layer."""

    async def status(self) -> Status:
        """Memory, variants and the operation under way."""

    def operation(self, operation_id: str, /) -> Operation | None:
        """One operation, also some time after its end; None or VariantError if it is unknown."""

    def operations(self) -> list[Operation]:
        """All operations that are remembered."""
