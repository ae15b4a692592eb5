"""Mean activation norm: the size of what an expert puts out for a token it receives."""

from __future__ import annotations

from liveprune.pruning.methods.method import Method

MAN = Method(
    name="man",
    title="Mean activation norm",
    reference="arXiv:2606.15716",
    formula="S_j = (1 / n_j) sum_t ||f_j(t)||",
    from_statistics=lambda layer: layer.saliency(1, 0, 1),
)
