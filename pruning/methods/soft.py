"""Soft frequency: the gate weight an expert receives in all; also known as SEER."""

from __future__ import annotations

from liveprune.pruning.methods.method import Method

SOFT = Method(
    name="soft",
    title="Soft (gate-weighted) frequency",
    reference="arXiv:2606.15716",
    formula="S_j = sum_t g_j(t)",
    from_statistics=lambda layer: layer.saliency(0, 1, 0),
)
