"""EASY-EP: an expert's contribution, counting most the tokens that the MoE block changes most."""

from __future__ import annotations

from liveprune.pruning.methods.method import Method

EASY_EP = Method(
    name="easy-ep",
    title="Expert pruning with few-shot demonstrations (EASY-EP)",
    reference="arXiv:2504.06792",
    formula="S_j = sum_t g_j(t) ||f_j(t)|| max(0, 1 - cos(x_t, x_t + y_t))",
    from_statistics=lambda layer: layer.contribution.copy(),
)
