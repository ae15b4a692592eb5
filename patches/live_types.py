"""What passes between the server, the engine and the workers about live variants.

Plain frozen data: it crosses process boundaries as JSON-like dictionaries (``dataclasses.asdict``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BASE_SLOT = 0
"""The slot of the base model; the variants' slots follow."""
BASE_TAG = "full"
"""``name:full`` is the base model."""
EXTRA_ARG = "liveprune"
"""Key of ``SamplingParams.extra_args`` under which a request carries its variant."""
COUNT_KEY = "count"
"""Beside the variant: live statistics count the request's tokens."""


@dataclass(frozen=True)
class Served:
    """A live variant as a request sees it, pinned for the whole of its life."""

    name: str
    """Full name, e.g. ``mixtral:e4k1``."""
    slot: int
    """Row of the routing tables."""
    salt: str | None
    """What keeps its KV blocks apart; None: shared with stock vLLM's (the untouched base)."""


@dataclass(frozen=True)
class FillProgress:
    """How far the rows of one slot are from being resident and verified."""

    phase: str
    """``filling``, ``verifying``, ``ready``, ``failed`` or ``cancelled``."""
    bytes_done: int = 0
    bytes_total: int = 0
    error: str = ""


@dataclass(frozen=True)
class KVStatus:
    """The KV cache of the engine."""

    blocks: int
    """Blocks that the scheduler may use now."""
    min_blocks: int
    """Enough for one request of the greatest length."""
    max_blocks: int
    """Blocks that the workers have addresses for."""
    block_bytes: int
    """Bytes of one block over all layers and ranks."""


@dataclass(frozen=True)
class EngineMemory:
    """Bytes, summed over all workers."""

    base_rows: int
    """Resident rows of base experts."""
    spare_rows: int
    """Resident spare rows (merged experts)."""
    all_base_rows: int
    """What ``base_rows`` is with every base expert resident."""
    other_weights: int
    """Everything of the model that is not an expert row."""
    process: int
    """The operating system's figure: resident (CPU: PSS of the workers) or device memory in use."""
    slots: Mapping[int, int] = field(default_factory=dict)
    """Rows that each live slot needs; slots share rows, so these do not add up."""


@dataclass(frozen=True)
class GoldenAnswer:
    """Greedy tokens of one canary prompt, and the log-probability of each."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
