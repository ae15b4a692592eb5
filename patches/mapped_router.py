"""The router of a layer whose gate keeps all rows: it chooses old experts, new ones do the work.

``expert_map`` names the new expert for each old one, or -1: that one answers with its constant
vector (MoNE, arXiv:2507.00390; merged experts behind their old router rows, methods.md 6, 4b).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter


class MappedRouter(BaseRouter):  # type: ignore[misc]
    """vLLM's own router for all gate rows, and the map behind it.

    Attributes:
        constants: float32 [tokens, hidden], what constant experts add to the output of the tokens
            routed last; None in a layer without any.
    """

    def __init__(
        self,
        own: Any,
        *,
        expert_map: torch.nn.Parameter,
        vectors: torch.nn.Parameter | None,
    ) -> None:
        """Wrap a router.

        Args:
            own: vLLM's, for the old experts.
            expert_map: int32 [old experts].
            vectors: float32 [constant experts, hidden], ascending by old expert.
        """
        super().__init__(top_k=own.top_k, global_num_experts=own.global_num_experts)
        self._own = own
        self.expert_map = expert_map
        self.vectors = vectors
        self.constants: torch.Tensor | None = None

    @property
    def routing_method_type(self) -> Any:
        """Custom: keeps vLLM from picking a kernel that routes by itself."""
        return RoutingMethodType.Custom

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = self._own._compute_routing(  # noqa: SLF001 - vLLM's subclass hook
            hidden_states, router_logits, indices_type, input_ids=input_ids
        )
        rows = self.expert_map.take(ids.long())
        if self.vectors is not None:
            is_constant = rows < 0
            # The vectors are in the order of the experts that the map calls constant.
            place = ((self.expert_map < 0).cumsum(0) - 1).clamp_min(0).take(ids.long())
            mass = weights.new_zeros(len(ids), len(self.vectors), dtype=torch.float32)
            mass.scatter_add_(1, place, weights.float() * is_constant)
            self.constants = mass @ self.vectors
            weights = weights.masked_fill(is_constant, 0.0)
            rows = rows.clamp_min(0)  # the kernel gets weight 0 and an expert that is there
        return weights.contiguous(), rows.to(indices_type or torch.int32).contiguous()
