"""Experts behind a gate that still chooses among those of the base model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from liveprune.pruning.plan import LayerPlan


class MappedExperts(nn.Module):
    """Stands in the place of a transformers experts module, which holds the new experts.

    Each old expert has its work done by the new one that ``expert_map`` names (HC-SMoE,
    arXiv:2410.08589); where a token's choices meet in one, it runs once for each, so that their
    weights add up. Under ``constants`` an expert that is not kept returns its vector (MoNE,
    arXiv:2507.00390).
    """

    def __init__(self, experts: Any, layer: LayerPlan, device: torch.device) -> None:
        """Wrap ``experts`` for a layer with an expert map or constants."""
        super().__init__()
        self._experts = experts
        self._new_ids = torch.tensor(layer.new_ids, device=device)
        self._vectors: Tensor | None = None
        if layer.constants is not None:
            # A row for each old expert: that of a kept one is never asked for.
            self._vectors = torch.zeros(layer.experts, layer.constants.shape[1], device=device)
            self._vectors[list(layer.pruned)] = torch.tensor(layer.constants, device=device)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Args: [tokens, hidden]; [tokens, top-k] ids of old experts; their weights."""
        new_ids = self._new_ids[ids]
        if self._vectors is None:
            mapped: Tensor = self._experts(hidden, new_ids, weights)
            return mapped
        constant = new_ids < 0
        own_weights = weights.masked_fill(constant, 0)
        computed: Tensor = self._experts(hidden, new_ids.clamp(min=0), own_weights)
        shares = weights.float().masked_fill(~constant, 0)
        added = torch.einsum("tk,tkh->th", shares, self._vectors[ids])
        return (computed.float() + added).to(computed.dtype)
