"""Weighted activation norm: what an expert adds to the layer's output, summed over its tokens."""

from __future__ import annotations

from liveprune.pruning.methods.method import Method

WEIGHTED_EAN = Method(
    name="weighted-ean",
    title="Gate-weighted expert activation norm, summed",
    reference="arXiv:2606.15716",
    formula="S_j = sum_t g_j(t) ||f_j(t)||",
    from_statistics=lambda layer: layer.saliency(0, 1, 1),
)
