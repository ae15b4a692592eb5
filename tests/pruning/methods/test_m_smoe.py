from __future__ import annotations

import numpy as np
import pytest

from liveprune.pruning.errors import PlanError
from tests.pruning.methods.folding import expert, fold

# Logits of four experts over three tokens: 2 points the way of 0, 3 that of 1.
LOGITS = np.array([[1.0, 0, 0], [0, 1, 0], [5, 1, 0], [0.1, 0.3, 0.1]])
# Two neurons of gate row, up row and down column; 2 is 0 in the other order, 3 is close to 1.
EXPERTS = [
    expert([[1, 0, 0], [0, 2, 0]]),
    expert([[0, 0, 3], [4, 0, 0]]),
    expert([[0, 2, 0], [1, 0, 0]]),
    expert([[0, 0, 2], [5, 0, 0]]),
]
PRODUCTS = LOGITS @ LOGITS.T


def test_by_hand() -> None:
    layer = fold("m-smoe", [30, 20, 10, 5], [0, 1], EXPERTS, logit_products=PRODUCTS)
    assert (layer.layer, layer.kept) == (4, (0, 1))
    assert layer.neuron_map is not None
    assert layer.neuron_map.tolist() == [[0, 1], [2, 3], [1, 0], [2, 3]]
    assert layer.neuron_shares is not None
    assert layer.neuron_shares.tolist() == [30, 20, 10, 5]


def test_gate_rows_may_stay() -> None:
    layer = fold(
        "m-smoe", [30, 20, 10, 5], [0, 1], EXPERTS, logit_products=PRODUCTS, keep_gate_rows=True
    )
    assert (layer.kept, layer.expert_map) == ((), (0, 1, 0, 1))


def test_dominant_experts_need_not_come_first() -> None:
    layer = fold("m-smoe", [1, 2, 30, 20], [2, 3], EXPERTS, logit_products=PRODUCTS)
    assert layer.neuron_map is not None
    assert layer.neuron_map.tolist() == [[1, 0], [2, 3], [0, 1], [2, 3]]


def test_what_was_never_hit() -> None:
    """In a group that was hit it counts nothing; where nobody was hit, all count the same."""
    layer = fold("m-smoe", [30, 0, 0, 0], [0, 1], EXPERTS, logit_products=PRODUCTS)
    assert layer.neuron_shares is not None
    assert layer.neuron_shares.tolist() == [30, 1, 0, 1]


def test_zero_logits_are_like_nothing() -> None:
    products = PRODUCTS.copy()
    products[3] = products[:, 3] = 0
    layer = fold("m-smoe", [30, 20, 10, 5], [0, 1], EXPERTS, logit_products=products)
    assert layer.neuron_map is not None
    assert layer.neuron_map[3].max() < 2


def test_super_experts_take_nobody_in() -> None:
    layer = fold("m-smoe", [30, 20, 10, 5], [0, 1], EXPERTS, logit_products=PRODUCTS, protected=[1])
    assert layer.neuron_map is not None
    assert [row.max() >= 2 for row in layer.neuron_map] == [False, True, False, False]
    with pytest.raises(PlanError, match=r"layer 4: keeps only its super experts \[0, 1\]"):
        fold("m-smoe", [1, 1, 1, 1], [0, 1], EXPERTS, logit_products=PRODUCTS, protected=[0, 1])
