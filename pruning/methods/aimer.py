"""AIMER: how far an expert's weights are from being all of one size; needs no data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from liveprune.pruning.methods.method import Method, Scores

if TYPE_CHECKING:
    from liveprune.pruning.calibration.weights import LayerWeights


def _score(layer: LayerWeights) -> Scores:
    """rms(W) / mean|W| over all entries of the expert's matrices, float64 sums.

    The paper prunes the highest mean|W| / rms(W); the reciprocal keeps the order and makes higher
    mean keep. An expert of zeros scores 0.
    """
    scores = []
    for matrices in layer.experts():
        entries = [matrix.double() for matrix in matrices]
        count = sum(entry.numel() for entry in entries)
        absolute = sum(float(entry.abs().sum()) for entry in entries)
        squares = sum(float(entry.square().sum()) for entry in entries)
        scores.append(math.sqrt(squares * count) / absolute if absolute else 0.0)
    return np.array(scores)


AIMER = Method(
    name="aimer",
    title="Absolute mean over root mean square of the weights (AIMER)",
    reference="arXiv:2603.18492",
    formula="S_j = rms(W_j) / mean|W_j|",
    from_weights=_score,
)
