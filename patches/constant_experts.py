"""What constant experts answer is added to what a layer's kernel gives.

Routing has just computed it (``live_router``, ``mapped_router``), in the same opaque operation.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from liveprune.pruning.errors import EngineError


class WithConstants(Protocol):
    """A routing that leaves the constants' part of the last batch."""

    constants: torch.Tensor | None


def add_constants(routed_experts: Any, routing: WithConstants) -> None:
    """Wrap ``forward_modular`` of one layer's experts, vLLM's RoutedExperts.

    Ranks' outputs are summed later, so one rank adds. What scales the experts' outputs later
    scales the constants with them; what scales the router's weights has scaled them already.
    """
    original = routed_experts.forward_modular
    adds = routed_experts.moe_config.moe_parallel_config.tp_rank == 0

    def forward_modular(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        constants = routing.constants
        if constants is None or not adds:
            return output
        if not isinstance(output, torch.Tensor):
            raise EngineError(
                f"{routed_experts.layer_name}: the kernel gives {type(output).__name__}, expected "
                f"a tensor that constants can be added to"
            )
        return (output + constants).to(output.dtype)  # rounded once

    routed_experts.forward_modular = forward_modular
