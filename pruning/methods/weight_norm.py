"""Weight norm: the size of an expert's matrices; a baseline without data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from liveprune.pruning.methods.method import Method, Scores

if TYPE_CHECKING:
    from liveprune.pruning.calibration.weights import LayerWeights


def _score(layer: LayerWeights) -> Scores:
    return np.array(
        [
            math.sqrt(sum(float(matrix.double().square().sum()) for matrix in matrices))
            for matrices in layer.experts()
        ]
    )


WEIGHT_NORM = Method(
    name="weight-norm",
    title="Weight norm",
    reference="",
    formula="S_j = ||(W_gate, W_up, W_down)_j||_2",
    from_weights=_score,
)
