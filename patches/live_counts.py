"""Live statistics on their way from a worker to the server: what one variant's tokens left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load

Values = npt.NDArray[np.float64]
BASE_KEY = "base"
"""Stands for a plan's digest where the base model answered."""


@dataclass(frozen=True, eq=False)
class LayerCounts:
    """One layer; columns are base experts, or experts after a plan that merges.

    Weights are as ``pruning.calibration.statistics`` says: as the model scales them.
    """

    gates: Values
    """[columns, 3]: sums of weight^0, ^1, ^2 of the tokens sent to an expert."""
    sampled: Values | None = None
    """[columns, 3, 3]: entry (a, b) is the sum of weight^a * ||f||^b over a sample of those tokens,
    each times the tokens that it stands for; None where no outputs are sampled."""
    largest: Values | None = None
    """[columns]: the largest entry of a sampled output; -inf for none."""


@dataclass(frozen=True, eq=False)
class VariantCounts:
    """Sums since the engine's start; they never fall while the engine knows the variant."""

    tokens: float
    layers: Mapping[int, LayerCounts]
    """By decoder layer index."""


def parse_counts(reply: Mapping[str, Any]) -> dict[str, VariantCounts]:
    """Read the answer of a worker's operation ``statistics``, by plan digest or ``BASE_KEY``."""
    scales = {int(index): float(scale) for index, scale in reply["gate_scales"].items()}
    return {
        key: VariantCounts(float(found["tokens"]), _layers(load(found["arrays"]), scales))
        for key, found in reply["variants"].items()
    }


def _layers(arrays: Mapping[str, Values], scales: Mapping[int, float]) -> dict[int, LayerCounts]:
    layers = {}
    for index, scale in scales.items():
        # Where vLLM scales a layer's output, its router leaves the weights unscaled.
        factors = scale ** np.arange(3.0)
        sampled = arrays.get(f"{index}.sampled")
        layers[index] = LayerCounts(
            arrays[f"{index}.sums"] * factors,
            None if sampled is None else sampled * factors[:, None],
            arrays.get(f"{index}.largest"),
        )
    return layers
