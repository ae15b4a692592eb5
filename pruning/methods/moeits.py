"""MoEITS: experts go whose raw weights say most about another expert's; needs no data.

arXiv:2604.10603, after methods.md, section 3. ``moeits_removals`` is the choice,
``moeits_plan`` what it makes of a budget or of tau.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from liveprune.pruning.methods.method import Method
from liveprune.pruning.methods.moeits_removals import Removals, removals
from liveprune.pruning.nmi import digitise, pairwise_nmi

if TYPE_CHECKING:
    from liveprune.pruning.calibration.weights import LayerWeights

MATRICES = ("gate", "up", "down")
SHARES = {"mixtral": (1 / 3, 1 / 3, 1 / 3)}
"""What gate, up and down count in the NMI of two experts, by model type."""
OTHER_SHARES = (0.2, 0.4, 0.4)


def expert_nmi(
    layer: LayerWeights,
    *,
    estimator: str = "plain",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    step: Callable[[], None] | None = None,
) -> npt.NDArray[np.float64]:
    """NMI of all pairs of a layer's experts, [experts, experts] float64, zero diagonal.

    Holds one matrix of each expert as codes, 2 bytes a number, and reads the layer three times.

    Args:
        layer: The experts.
        estimator: One of ``nmi.ESTIMATORS``.
        seed: For those that shuffle.
        dtype: Weights are rounded to it first. In float16 the bins' edges are float16, too;
            bfloat16 is binned in float32. The published code loads Mixtral as float16 and
            Qwen1.5-MoE as bfloat16.
        step: Called after each pair and matrix: 3 E (E - 1) / 2 times.

    Raises:
        CheckpointError: weights are NaN or infinite; names the layer, the expert and the matrix.
    """
    shares = SHARES.get(layer.architecture.model_type, OTHER_SHARES)
    generator = np.random.default_rng([seed, layer.tensors.layer.index])
    experts = layer.tensors.layer.experts
    result = np.zeros((experts, experts))
    for which, share in enumerate(shares):
        name = f"layer {layer.tensors.layer.index}, expert {{}}, {MATRICES[which]}"
        codes = [
            digitise(_histogrammed(matrix, dtype), name.format(expert))
            for expert, matrix in enumerate(_matrices(layer, which))
        ]
        result += share * pairwise_nmi(codes, estimator, generator, step)
    return result


def _matrices(layer: LayerWeights, which: int) -> Iterator[torch.Tensor]:
    for gate_up, down in layer.experts():
        yield down if which == 2 else gate_up.chunk(2)[which]


def _histogrammed(matrix: torch.Tensor, dtype: torch.dtype) -> npt.NDArray[np.floating]:
    rounded = matrix.to(dtype)
    # NumPy has no bfloat16.
    return (rounded.float() if dtype == torch.bfloat16 else rounded).numpy()


def _removals(
    layer: LayerWeights, estimator: str, seed: int, step: Callable[[], None] | None
) -> Removals:
    return removals(expert_nmi(layer, estimator=estimator, seed=seed, step=step))


MOEITS = Method(
    name="moeits",
    title="Mutual information between the experts' weights (MoEITS)",
    reference="arXiv:2604.10603",
    formula="S_j = when the greedy removal by NMI(W_i, W_j) drops expert j",
    from_pairs=_removals,
    comparable=False,
)
