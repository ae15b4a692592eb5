"""Mean squared activation norm: as the mean norm, with large outputs counting more."""

from __future__ import annotations

from liveprune.pruning.methods.method import Method

MSAN = Method(
    name="msan",
    title="Mean squared activation norm",
    reference="arXiv:2606.15716",
    formula="S_j = (1 / n_j) sum_t ||f_j(t)||^2",
    from_statistics=lambda layer: layer.saliency(1, 0, 2),
)
