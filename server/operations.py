"""What operators see of long-running changes, and of variants: plain data for API and CLI."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """States of an operation, in the order in which a swap goes through them.

    Until ``SWITCHING`` an operation can be cancelled and a failure leaves everything as it was.
    """

    QUEUED = "queued"
    MAKING_ROOM = "making-room"
    """The KV cache gives back the bytes that the new rows need."""
    FILLING = "filling"
    """Rows are read from the checkpoint, or merged, and checked byte for byte."""
    PUBLISHING = "publishing"
    """The routing tables become live; no request uses them yet."""
    CANARY = "canary"
    """Golden tokens."""
    SCORING = "scoring"
    """Candidates of a search answer, below user traffic."""
    SWITCHING = "switching"
    """New requests of the alias go to the new variant."""
    DRAINING = "draining"
    """Streams on the old variant end on the old variant."""
    RELEASING = "releasing"
    """Rows that nothing needs any more are given back."""
    GROWING = "growing"
    """The KV cache takes the freed bytes."""
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (State.DONE, State.FAILED, State.CANCELLED)


@dataclass
class Operation:
    """One change, from request to end; kept for a while after it."""

    kind: str
    """``add``, ``remove``, ``swap`` or ``rollback``; ``score`` or ``generate`` for candidates."""
    variant: str
    """Full name of the variant it is about."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: State = State.QUEUED
    bytes_done: int = 0
    bytes_total: int = 0
    freed_bytes: int = 0
    error: str = ""
    """Why it failed, in one line."""
    created: float = field(default_factory=time.time)
    """Seconds since 1970."""
    finished: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Time spent in each state, by its name."""
    notes: list[str] = field(default_factory=list)
    """What an operator should know, e.g. that there were no golden tokens to compare with."""

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "kind": self.kind,
            "variant": self.variant,
            "state": self.state.value,
            "progress": {"bytes_done": self.bytes_done, "bytes_total": self.bytes_total},
            "freed_bytes": self.freed_bytes,
            "error": self.error or None,
            "created": self.created,
            "finished": self.finished,
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class VariantView:
    """One variant as listings show it."""

    name: str
    """``name:tag``."""
    tag: str
    digest: str | None
    """Of its plan; None for ``full``."""
    state: str
    """``live`` (answers requests), ``preparing``, ``draining`` or ``standby`` (known only)."""
    is_alias: bool
    """The bare name routes to it."""
    is_previous: bool
    """A roll-back would return to it."""
    experts: Mapping[str, int]
    """``{"min", "max", "total"}`` kept over the layers."""
    top_k: Mapping[str, int]
    """``{"min", "max"}`` over the layers."""
    row_bytes: int
    """Bytes of the expert rows it needs; 0 unless live."""
    in_flight: int
    """Requests that it is answering."""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "experts": dict(self.experts), "top_k": dict(self.top_k)}


@dataclass(frozen=True)
class Status:
    """The engine's memory and what is going on."""

    model: str
    alias: str
    """Full name of the variant that the bare name routes to."""
    previous: str | None
    ready: bool
    """Some variant can answer."""
    operation: Operation | None
    """The one under way."""
    expert_bytes: int
    spare_bytes: int
    other_weight_bytes: int
    kv_bytes: int
    kv_blocks: int
    kv_max_blocks: int
    process_bytes: int
    """The operating system's figure for the engine's workers."""
    memory_target_bytes: int | None
    """Bound of experts + spare + other weights + KV."""
    fingerprint: str
    """Of the base model's config and experts (``pruning.checkpoint.fingerprint``)."""
    variants: tuple[VariantView, ...]

    def to_json(self) -> dict[str, Any]:
        fields = dict(vars(self))
        fields["operation"] = self.operation.to_json() if self.operation else None
        fields["variants"] = [variant.to_json() for variant in self.variants]
        return fields
