"""What ``liveprune serve`` tells every process of the engine about live variants.

It travels in vLLM's own ``additional_config``, which reaches engine and workers and is part of the
compile cache's key. Without it the plugin leaves routing, loading and the KV cache alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

CONFIG_KEY = "liveprune"
OFF_KEY = "liveprune_off"
"""Beside it, where live variants were turned off: why."""


@dataclass(frozen=True)
class LiveConfig:
    """Capacity of the routing tables, and what is resident at start."""

    checkpoint: str
    """Folder that rows are filled from."""
    slots: int
    """Variants that can be live at once, the base included."""
    spare_rows: int
    """Rows for merged experts in each layer; address space only, until used."""
    kv_extra_bytes: int
    """What expert rows could give to the KV cache at most."""
    resident_slot: int = 0
    """The slot that is live at start: 0, the base model, or that of ``resident_plan``."""
    resident_plan: str | None = None
    """Plan file of the variant to start compact with."""
    statistics: bool = False
    """Count which experts users' tokens are routed to."""
    sample_tokens: int = 0
    """Tokens of a sampled step whose experts' outputs are measured; 0: none."""
    sample_every: int = 64
    """One step in so many is sampled."""
    required: bool = False
    """Refuse to start where live variants cannot work, instead of serving without them."""

    def to_additional_config(self) -> dict[str, Any]:
        return {CONFIG_KEY: asdict(self)}


def live_config(vllm_config: Any) -> LiveConfig | None:
    """Read it back from vLLM's config; None where live variants are off."""
    additional = vllm_config.additional_config
    fields = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
    return LiveConfig(**fields) if isinstance(fields, dict) else None


def why_off(vllm_config: Any) -> str:
    """What turned live variants off; empty if nothing did."""
    return str(vllm_config.additional_config.get(OFF_KEY, ""))
