"""The routers of the families, and what they choose in a model that lacks the other experts.

Plain loops in Python's floats; shares no code with the tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from liveprune.patches.routing import RouterSpec

Chosen = dict[int, float]


@dataclass(frozen=True)
class Kind:
    """A router of one of the families, as vLLM would build it."""

    experts: int
    top_k: int
    renormalise: bool = True
    scoring: str = "softmax"
    groups: int = 0
    """0: not a grouped router."""
    top_groups: int = 1
    bias: tuple[float, ...] | None = None
    scale: float = 1.0

    def arguments(self, kept: Sequence[int] | None = None) -> dict[str, Any]:
        """Of ``create_fused_moe_router``, for the model with only these experts."""
        bias = None if self.bias is None else torch.tensor(self.bias)
        return {
            "top_k": self.top_k,
            "global_num_experts": self.experts if kept is None else len(kept),
            "renormalize": self.renormalise,
            "use_grouped_topk": self.groups > 0,
            "num_expert_group": self.groups or None,
            "topk_group": self.top_groups if self.groups else None,
            "scoring_func": self.scoring,
            "routed_scaling_factor": self.scale,
            "e_score_correction_bias": bias if bias is None or kept is None else bias[list(kept)],
        }

    @property
    def spec(self) -> RouterSpec:
        return RouterSpec.from_arguments(self.arguments())


KINDS = {
    "mixtral": Kind(8, 2),
    "qwen3": Kind(16, 4),
    "qwen2": Kind(16, 4, renormalise=False),
    "deepseek-v2-lite": Kind(16, 4, renormalise=False, groups=1, scale=1.5),
    "deepseek-v2": Kind(16, 3, renormalise=False, groups=4, top_groups=2, scale=2.5),
    "deepseek-v3": Kind(
        16,
        3,
        scoring="sigmoid",
        groups=4,
        top_groups=2,
        bias=tuple(np.random.default_rng(0).normal(0, 0.3, 16).tolist()),
        scale=2.5,
    ),
    "moonlight": Kind(
        16,
        3,
        scoring="sigmoid",
        groups=1,
        bias=tuple(np.random.default_rng(1).normal(0, 0.3, 16).tolist()),
    ),
    "sigmoid": Kind(8, 2, scoring="sigmoid", renormalise=False),
}


def plain_route(kind: Kind, logits: Sequence[float], kept: Sequence[int], top_k: int) -> Chosen:
    """One token of a model that has the kept experts only, in Python's floats."""
    x = [logits[e] for e in kept]
    if kind.scoring == "softmax":
        powers = [math.exp(v - max(x)) for v in x]
        scores = [p / math.fsum(powers) for p in powers]
    else:
        scores = [1 / (1 + math.exp(-v)) for v in x]
    choice = [s + (kind.bias[e] if kind.bias else 0.0) for s, e in zip(scores, kept, strict=True)]
    candidates = list(range(len(x)))
    if kind.groups > 1:
        size = len(x) // kind.groups
        runs = [candidates[g * size : (g + 1) * size] for g in range(kind.groups)]
        best_of = 2 if kind.bias else 1
        runs.sort(key=lambda run: -sum(sorted((choice[i] for i in run), reverse=True)[:best_of]))
        candidates = [i for run in runs[: kind.top_groups] for i in run]
    best = sorted(candidates, key=lambda i: -choice[i])[:top_k]
    total = math.fsum(scores[i] for i in best) if kind.renormalise else 1.0
    scale = kind.scale if kind.groups else 1.0
    return {kept[i]: scores[i] / total * scale for i in best}


def plain_map(logits: Sequence[float], rows: Sequence[Sequence[float]], top_k: int) -> Chosen:
    """One token of an EEP model: score index -> weight divided by the sum."""
    powers = [math.exp(v - max(logits)) for v in logits]
    p = [v / math.fsum(powers) for v in powers]
    scores = [math.fsum(a * b for a, b in zip(row, p, strict=True)) for row in rows]
    best = sorted(range(len(scores)), key=lambda j: -scores[j])[:top_k]
    total = math.fsum(scores[j] for j in best)
    return {j: scores[j] / total for j in best}


def random_kept(kind: Kind, rng: np.random.Generator) -> list[int]:
    """A mask that the guards of plans let pass."""
    if kind.groups <= 1:
        count = int(rng.integers(1, kind.experts + 1))
        return sorted(rng.choice(kind.experts, count, replace=False).tolist())
    size = kind.experts // kind.groups
    each = int(rng.integers(2, size + 1))
    picks = (g * size + rng.choice(size, each, replace=False) for g in range(kind.groups))
    return sorted(int(e) for pick in picks for e in pick)
