"""The router of a layer whose gate chooses among the base's experts: the choice stays vLLM's own,
then a map says who does the work, or that nobody does.

Sources: HC-SMoE (arXiv:2410.08589) keeps the gate and ties experts; MoNE (arXiv:2507.00390) has
pruned experts answer with a constant vector.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter


def map_choices(
    weights: torch.Tensor,
    ids: torch.Tensor,
    expert_map: torch.Tensor,
    vectors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Send a choice among the base's experts to those that do their work.

    Args:
        weights: [tokens, top_k].
        ids: [tokens, top_k], of the base's experts.
        expert_map: int32 [base experts]; -1: the expert answers with its vector.
        vectors: float32 [number of -1, hidden], ascending by base expert; None: there are none.

    Returns:
        Weights and ids for the kernel, two of a token's ids perhaps the same; a vector's place has
        weight 0 and id 0. And the sum of weight times vector, float32 [tokens, hidden], or None.
    """
    new = expert_map[ids.long()]
    if vectors is None:
        return weights, new.to(ids.dtype), None
    constant = expert_map < 0
    place = (constant.cumsum(0) - 1).clamp_min(0)
    answered = constant[ids.long()]
    shares = weights.new_zeros(len(ids), len(vectors), dtype=torch.float32)
    shares.scatter_add_(1, place[ids.long()], weights.float() * answered)
    return (
        weights.masked_fill(answered, 0.0),
        new.clamp_min(0).to(ids.dtype),
        shares @ vectors,
    )


class MappedRouter(BaseRouter):  # type: ignore[misc]
    """``map_choices`` behind one of vLLM's routers.

    Attributes:
        constants: float32 [tokens, hidden], what to add to the output of the tokens routed last;
            None if the layer has no constants (``constant_experts``).
    """

    def __init__(
        self,
        inner: BaseRouter,
        experts: int,
        expert_map: torch.nn.Parameter,
        vectors: torch.nn.Parameter | None,
    ) -> None:
        """Choose as ``inner`` does, for ``experts`` experts that there are."""
        super().__init__(top_k=inner.top_k, global_num_experts=experts)
        self.inner = inner
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
        weights, ids = self.inner._compute_routing(  # noqa: SLF001 - vLLM's subclass hook
            hidden_states, router_logits, indices_type, input_ids=input_ids
        )
        weights, ids, self.constants = map_choices(weights, ids, self.expert_map, self.vectors)
        return weights.contiguous(), ids.contiguous()
