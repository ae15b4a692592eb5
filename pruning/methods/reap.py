"""REAP: what an expert adds to the layer's output for a token it receives.

The gate weight is the one the model itself uses: renormalised if the model renormalises.
"""

from __future__ import annotations

from liveprune.pruning.methods.method import Method

REAP = Method(
    name="reap",
    title="Router-weighted expert activation pruning (REAP)",
    reference="arXiv:2510.13999",
    formula="S_j = (1 / n_j) sum_t g_j(t) ||f_j(t)||",
    from_statistics=lambda layer: layer.saliency(1, 1, 1),
)
