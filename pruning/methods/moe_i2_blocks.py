"""MoE-I2: of a few sets for each of several layers in a row, the combination that does best.

arXiv:2411.01016 (methods.md, 7.3), known from a summary: for T consecutive layers all K^T
combinations are tried, and that of the smallest output loss stays. Unverified, and chosen here:
the block gets the base model's hidden states, and whole decoder layers run, attention and all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from liveprune.pruning.calibration.streamed import StreamedModel
from liveprune.pruning.evaluation.carried_out import layer_carried_out
from liveprune.pruning.layer_plan import LayerPlan


@dataclass(frozen=True)
class BlockChoice:
    """The best combination of a block."""

    layers: tuple[LayerPlan, ...]
    loss: float
    tried: int


def choose_block(
    stream: StreamedModel,
    candidates: Sequence[Sequence[LayerPlan]],
    masks: Sequence[Tensor],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
) -> BlockChoice:
    """Try every combination of one candidate for each layer.

    The loss is the sum over batches of the Frobenius norm of the change of the hidden states after
    the last layer. All layers from the first to the last, those without experts between them too,
    are in memory at once.

    Args:
        stream: With no layer in place.
        candidates: Of each layer of the block, in order; of equal losses the first combination,
            in lexicographic order, stays.
        masks: Of each batch [rows, length], 1 for tokens and 0 for padding.
        before: Of each batch [rows, length, hidden]: the base model before the first layer.
        after: And after the last.

    Raises:
        CheckpointError: a tensor is missing or not of its shape, or hidden states are not finite.
    """
    combinations = list(itertools.product(*candidates))
    first, last = combinations[0][0].layer, combinations[0][-1].layer
    with ExitStack() as stack:
        loaded = {i: stack.enter_context(stream.layer(i)) for i in range(first, last + 1)}
        losses = []
        for combination in combinations:
            with ExitStack() as pruned:
                for plan in combination:
                    block = loaded[plan.layer].mlp
                    pruned.enter_context(layer_carried_out(block, stream.spec, plan))
                total = 0.0
                for x, mask, target in zip(before, masks, after, strict=True):
                    change = stream.advance(x, mask, last).float() - target.float()
                    total += float(torch.linalg.vector_norm(change[mask.bool()].double()))
                losses.append(total)
    best = min(range(len(losses)), key=losses.__getitem__)
    return BlockChoice(combinations[best], losses[best], len(losses))
