"""Routing frequency: how many tokens an expert receives."""

from __future__ import annotations

from liveprune.pruning.methods.method import Method

FREQUENCY = Method(
    name="frequency",
    title="Routing frequency",
    reference="arXiv:2606.15716",
    formula="S_j = n_j",
    from_statistics=lambda layer: layer.saliency(0, 0, 0),
)
