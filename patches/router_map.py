"""The router of an EEP-merged layer: softmax over the original experts, map, top-k, divide.

Source: EEP (arXiv:2407.00945), section on router mapping; methods.md 2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from liveprune.pruning.plan import SMALLEST_SUM


def route(
    logits: torch.Tensor, router_map: torch.Tensor, top_k: int, *, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route tokens onto merged experts.

    Args:
        logits: [tokens, router width], any float dtype.
        router_map: [experts, router width], float32.
        top_k: experts per token.
        renormalise: divide the weights by their sum, sign kept.

    Returns:
        weights [tokens, top_k] float32 and expert ids [tokens, top_k] int32.
    """
    probabilities = torch.softmax(logits.to(torch.float32), dim=-1)
    weights, ids = torch.topk(probabilities @ router_map.t(), top_k, dim=-1)
    if renormalise:
        total = weights.sum(dim=-1, keepdim=True)
        near_zero = total.abs() < SMALLEST_SUM
        weights = weights / torch.where(near_zero, torch.full_like(total, SMALLEST_SUM), total)
    return weights, ids.to(torch.int32)


class RouterMapRouter(BaseRouter):  # type: ignore[misc]
    """vLLM's router interface over ``route``."""

    def __init__(
        self,
        top_k: int,
        global_num_experts: int,
        *,
        renormalise: bool,
        scale: float,
        router_map: torch.nn.Parameter,
    ) -> None:
        super().__init__(top_k=top_k, global_num_experts=global_num_experts)
        self.renormalise = renormalise
        self.scale = scale
        self.router_map = router_map

    @property
    def routing_method_type(self) -> Any:
        """Custom: keeps vLLM from picking a kernel that routes by itself."""
        return RoutingMethodType.Custom

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,  # noqa: ARG002 - vLLM's interface
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = route(
            router_logits, self.router_map, self.top_k, renormalise=self.renormalise
        )
        if self.scale != 1.0:
            weights = weights * self.scale
        return weights.contiguous(), ids.to(indices_type or torch.int32).contiguous()
