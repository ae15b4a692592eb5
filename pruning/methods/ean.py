"""Expert activation norm: the size of what an expert puts out, summed over its tokens."""

from __future__ import annotations

from liveprune.pruning.methods.method import Method

EAN = Method(
    name="ean",
    title="Expert activation norm, summed",
    reference="arXiv:2606.15716",
    formula="S_j = sum_t ||f_j(t)||",
    from_statistics=lambda layer: layer.saliency(0, 0, 1),
)
