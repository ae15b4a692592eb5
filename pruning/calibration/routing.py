"""What a layer's router would do if only some of its experts were there."""

from __future__ import annotations

import torch
from torch import Tensor

from liveprune.pruning.model_spec import Router


def sliced_routing(
    logits: Tensor, kept: Tensor, router: Router, top_k: int, bias: Tensor | None = None
) -> Tensor:
    """Weights of all experts under a gate that is sliced to the kept ones (methods.md, 1.2 a).

    Exactly what the pruned checkpoint computes: softmax over the kept experts only, its groups,
    its top-k. Sets that keep other numbers in each group, which no checkpoint can hold, are
    routed by the same rules.

    Args:
        logits: [tokens, experts], of the whole gate.
        kept: [..., experts] bool, one or many sets; each holds at least ``top_k`` experts that the
            router can reach, and ``router.group_top`` in each group.
        router: Of the model.
        top_k: Active experts.
        bias: [experts], the correction bias of routers that have one.

    Returns:
        [..., tokens, experts] float32, 0 where an expert is not chosen.
    """
    there = kept[..., None, :]
    z = logits.float().masked_fill(~there, -torch.inf)
    scores = z.softmax(-1) if router.scoring == "softmax" else z.sigmoid()
    choice = scores if bias is None else scores + bias
    choice = choice.masked_fill(~there, -torch.inf)
    if router.groups > 1:
        grouped = choice.view(*choice.shape[:-1], router.groups, -1)
        of_group = grouped.topk(router.group_top, -1).values.sum(-1)
        best = of_group.topk(router.top_groups, -1).indices
        open_groups = torch.zeros_like(of_group, dtype=torch.bool).scatter_(-1, best, value=True)
        choice = grouped.masked_fill(~open_groups[..., None], -torch.inf).flatten(-2)
    ids = choice.topk(top_k, -1).indices
    weights = scores.gather(-1, ids)
    if router.renormalise:
        # The published models' guard against a sum of 0, which sigmoids can reach.
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return torch.zeros_like(scores).scatter_(-1, ids, weights * router.scale)
