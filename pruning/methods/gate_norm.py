"""Gate norm: the size of an expert's row of the router; a baseline without data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from liveprune.pruning.methods.method import Method, Scores

if TYPE_CHECKING:
    from liveprune.pruning.calibration.weights import LayerWeights


def _score(layer: LayerWeights) -> Scores:
    return np.asarray(layer.gate().double().norm(dim=1).numpy(), np.float64)


GATE_NORM = Method(
    name="gate-norm",
    title="Norm of the router's row",
    reference="",
    formula="S_j = ||W_G[j]||_2",
    from_weights=_score,
)
