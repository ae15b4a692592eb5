"""Statistics from a file instead of a pass: of live traffic, or of a pass that ran elsewhere.

Such a file may lack sums (NaN) that only a pass over rows can gather: a method that needs them is
refused by name, never given a score that means nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from liveprune.pruning.calibration.statistics import EXTRAS, RoutingStatistics
from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.errors import DataError
from liveprune.pruning.methods.method import Method
from liveprune.pruning.model_spec import ModelSpec


def load_given(
    path: Path, model: Path, spec: ModelSpec, method: Method, *, super_experts: bool
) -> RoutingStatistics:
    """Read statistics and check that they are this model's and enough for a method.

    Args:
        path: what ``RoutingStatistics.save`` wrote.
        model: Checkpoint folder.
        spec: Of the model.
        method: That is to work from them.
        super_experts: Largest activations are needed as well.

    Raises:
        DataError: naming the method and what the file lacks, or why it does not fit.
    """
    if method.reads_rows:
        raise DataError(
            f"method {method.name}: reads calibration rows, expected a JSONL file instead of the "
            f"statistics {path}"
        )
    found = RoutingStatistics.load(path)
    own = fingerprint_model(model)
    if found.model != own:
        raise DataError(f"{path}: statistics of the model {found.model}, expected {own}")
    shapes = {index: len(layer.sums) for index, layer in found.layers.items()}
    expected = {layer.index: layer.experts for layer in spec.layers}
    if shapes != expected:
        raise DataError(f"{path}: found experts by layer {shapes}, expected {expected}")
    lacking = _lacking(found, method)
    if super_experts and _has_nan(found, "max_activation"):
        lacking = lacking or "max_activation"
    if lacking:
        asker = "keep_super_experts" if lacking == "max_activation" else f"method {method.name}"
        raise DataError(
            f"{asker}: needs {_NAMES.get(lacking, lacking)}, which {path} does not hold; expected "
            f"calibration rows"
        )
    return found


_NAMES = {
    "max_activation": "the experts' largest outputs",
    "sums": "the experts' outputs (a server samples them: --statistics-sample)",
    "scores": "sums that only a pass over rows gathers",
}


def _lacking(found: RoutingStatistics, method: Method) -> str:
    """What the method needs and the statistics have not; empty if they suffice."""
    layers = list(found.layers.values())
    for extra in sorted(method.needs):
        for name in EXTRAS[extra]:
            if any(getattr(layer, name) is None for layer in layers):
                return name
    if method.from_corpora is not None:
        return "sums" if _has_nan(found, "sums") else ""
    score = method.from_statistics
    if score is None or not any(np.isnan(score(layer)).any() for layer in layers):
        return ""
    return "sums" if _has_nan(found, "sums") else "scores"


def _has_nan(found: RoutingStatistics, name: str) -> bool:
    return any(np.isnan(getattr(layer, name)).any() for layer in found.layers.values())
