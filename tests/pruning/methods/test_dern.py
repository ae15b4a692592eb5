from __future__ import annotations

import numpy as np
import pytest
import torch

from liveprune.pruning import alignment
from liveprune.pruning.errors import PlanError
from liveprune.pruning.methods import METHODS
from tests.pruning.methods.folding import expert, fold

# Expert 2's neurons: one along neuron 1 of expert 0, one halfway between neurons 0 of 0 and 1.
EXPERTS = [
    expert([[1, 0, 0], [0, 1, 0]]),
    expert([[0, 0, 1], [0, -1, 1]]),
    expert([[0, 7, 0], [1, 0, 1]]),
]


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.5, [1, 0]), (0.8, [1, -1]), (1.0, [-1, -1])]
)
def test_by_hand(threshold: float, expected: list[int]) -> None:
    """Cosines of 1 and of sqrt(1/2); of the two equally similar ones the first is taken."""
    layer = fold("dern", [5, 4, 0], [0, 1], EXPERTS, options={"threshold": threshold})
    assert (layer.layer, layer.kept) == (4, (0, 1))
    assert layer.neuron_map is not None
    assert layer.neuron_map.tolist() == [[0, 1], [2, 3], expected]
    assert layer.neuron_shares is not None
    # An expert that was never hit counts as hit once.
    assert layer.neuron_shares.tolist() == [5, 4, 1]


def test_super_experts_take_nothing_in() -> None:
    layer = fold("dern", [5, 4, 0], [0, 1], EXPERTS, protected=[0])
    assert layer.neuron_map is not None
    # Of expert 1's neurons the first has sqrt(1/2) of the second one; nothing is like the first.
    assert layer.neuron_map[2].tolist() == [-1, 2]
    layer = fold("dern", [5, 4, 0], [0, 1], EXPERTS, protected=[0, 1])
    assert layer.neuron_map is not None
    assert layer.neuron_map[2].tolist() == [-1, -1]


def test_equals_all_pairs_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "BLOCK", 5)
    generator = torch.Generator().manual_seed(0)
    experts = [expert(torch.randn(12, 9, generator=generator).tolist()) for _ in range(6)]
    flat = np.stack([alignment.neurons(x).double().numpy() for x in experts])
    flat /= np.linalg.norm(flat, axis=2, keepdims=True)
    kept = [1, 3, 4]
    layer = fold("dern", [3, 9, 1, 7, 8, 2], kept, experts, options={"threshold": 0.7})
    assert layer.neuron_map is not None
    dropped = 0
    for i in (0, 2, 5):
        for n in range(12):
            cosines = [float(flat[i, n] @ flat[j, m]) for j in kept for m in range(12)]
            nearest = int(np.argmax(cosines))
            expected = nearest if cosines[nearest] > 0.7 else -1
            dropped += expected < 0
            assert layer.neuron_map[i, n] == expected
    assert 0 < dropped < 36


def test_neurons_of_zeros_go_nowhere() -> None:
    experts = [EXPERTS[0], EXPERTS[1], expert([[0, 0, 0], [0, 1, 0]])]
    layer = fold("dern", [5, 4, 3], [0, 1], experts, options={"threshold": 0.0})
    assert layer.neuron_map is not None
    assert layer.neuron_map[2].tolist() == [-1, 1]


def test_a_threshold_is_a_cosine() -> None:
    with pytest.raises(PlanError, match=r"threshold is 1\.5, expected a cosine"):
        METHODS["dern"].with_options({"threshold": 1.5})
