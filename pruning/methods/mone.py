"""MoNE: an expert whose output hardly varies is replaced by what it puts out on average.

arXiv:2507.00390 (methods.md 5.4). The gate keeps all its rows, so that every token goes to the
experts it went to before; the constant vector of one that was pruned takes its place. The published
code averages the gate weight over all tokens, as here, and leaves experts that no token reached
undefined: they score 0 and answer with the zero vector.
"""

from __future__ import annotations

import numpy as np

from liveprune.pruning.calibration.statistics import LayerStatistics
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.methods.method import Folding, Method, Scores


def _score(layer: LayerStatistics) -> Scores:
    hits = np.maximum(layer.counts, 1.0)[:, None]
    mean = layer.gathered("output_sums") / hits
    # Of the population; rounding may carry it below 0.
    variance = np.maximum(layer.gathered("output_squares") / hits - mean**2, 0.0)
    # Over all choices, k for each token: the same for all experts of all layers.
    gate = layer.sums[:, 1, 0] / max(layer.counts.sum(), 1.0)
    scores: Scores = np.sqrt(variance.sum(axis=1)) * gate
    return scores


def _fold(task: Folding) -> LayerPlan:
    found = task.calibrated
    layer = task.budget.layer
    gone = sorted(set(range(layer.experts)) - set(task.kept))
    hits = np.maximum(found.counts[gone], 1.0)[:, None]
    return LayerPlan(
        layer=layer.index,
        experts=layer.experts,
        top_k=task.budget.top_k,
        kept=task.kept,
        constants=(found.gathered("output_sums")[gone] / hits).astype(np.float32),
    )


MONE = Method(
    name="mone",
    title="Mixture of novices and experts (MoNE)",
    reference="arXiv:2507.00390",
    formula="S_j = ||std_t f_j(t)||_2 * mean_t g_j(t); pruned experts return mean_t f_j(t)",
    from_statistics=_score,
    fold=_fold,
    needs=frozenset({"outputs"}),
    leaves_constants=True,
)
