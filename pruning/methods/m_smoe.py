"""M-SMoE: the busiest experts of the model take in the others, by what the router says of them.

Li et al., ICLR 2024 (methods.md 6.1). Dominant experts are the most frequent ones of all layers
together, so that layers keep different numbers. Every other expert joins the dominant one whose
router logits, over all calibration tokens, point the same way most; its neurons are put in the
order that fits that one's weights best, and the group is averaged by frequency. The second stage of
the paper, low rank and sparse weights (MC-SMoE), is not here.
"""

from __future__ import annotations

import numpy as np

from liveprune.pruning.alignment import Order, aligned
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.methods.expert_groups import (
    Owners,
    aligned_layer,
    cosines,
    only_protected,
    shares,
)
from liveprune.pruning.methods.method import Folding, Method


def _fold(task: Folding) -> LayerPlan:
    owners = _owners(task)
    orders: dict[int, Order] = {}
    for owner in np.unique(owners).tolist():
        members = [i for i in np.flatnonzero(owners == owner).tolist() if i != owner]
        # Two experts are in memory.
        target = task.weights.expert(owner) if members else None
        for i in members:
            if target is not None:
                orders[i] = aligned(task.weights.expert(i), target)
    weights = shares(owners, task.calibrated.counts)
    return aligned_layer(task.budget, owners, orders, weights, keep_gate_rows=task.keep_gate_rows)


def _owners(task: Folding) -> Owners:
    """Of equally similar dominant experts the first."""
    dominant = [i for i in task.kept if i not in task.protected]
    if not dominant:
        raise only_protected(task.budget.layer.index, task.protected)
    similar = cosines(task.calibrated.gathered("logit_products"))
    owners: Owners = np.array(dominant)[similar[:, dominant].argmax(axis=1)]
    owners[list(task.kept)] = task.kept
    return owners


M_SMOE = Method(
    name="m-smoe",
    title="Merging into the most frequent experts (M-SMoE)",
    reference="arXiv:2310.01334",
    formula="S_j = n_j; the others join by cosine of logits, aligned, averaged by n_j",
    from_statistics=lambda layer: layer.saliency(0, 0, 0),
    fold=_fold,
    needs=frozenset({"logits"}),
    allocate="global",
    keep_gate_rows=True,
)
