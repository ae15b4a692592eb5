"""Every method on a case worked by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from liveprune.pruning.architectures import ARCHITECTURES
from liveprune.pruning.budget import LayerBudget
from liveprune.pruning.calibration.statistics import LayerStatistics
from liveprune.pruning.calibration.weights import Weights
from liveprune.pruning.errors import PlanError
from liveprune.pruning.methods import METHODS, Method, find_method
from liveprune.pruning.methods.method import Folding
from liveprune.pruning.model_spec import ModelSpec, MoELayer, Router

# Expert 0 gets two tokens with (g, ||f||) = (1/2, 2) and (1/4, 4); expert 1 one with (1, 3);
# expert 2 none. The tokens' 1 - cos(x, x + y) are 0.1, 0.2 and 0.3.
TOKENS = [[(0.5, 2.0, 0.1), (0.25, 4.0, 0.2)], [(1.0, 3.0, 0.3)], []]
BY_HAND = {
    "frequency": [2, 1, 0],
    "soft": [0.75, 1, 0],
    "ean": [6, 3, 0],
    "weighted-ean": [2, 3, 0],
    "man": [3, 3, -math.inf],
    "msan": [10, 9, -math.inf],
    "reap": [1, 3, -math.inf],
    "easy-ep": [0.3, 0.9, 0],
}


def statistics() -> LayerStatistics:
    sums = np.array(
        [
            [[sum(g**a * n**b for g, n, _ in tokens) for b in range(3)] for a in range(3)]
            for tokens in TOKENS
        ]
    )
    contribution = np.array([sum(g * n * change for g, n, change in tokens) for tokens in TOKENS])
    return LayerStatistics(sums, np.ones(3), contribution)


@pytest.mark.parametrize("name", BY_HAND)
def test_from_statistics(name: str) -> None:
    method = METHODS[name]
    assert method.from_statistics is not None
    np.testing.assert_allclose(method.from_statistics(statistics()), BY_HAND[name])


def test_every_method_with_calibration_is_worked_by_hand() -> None:
    plain = (m for m in METHODS.values() if m.from_statistics is not None and not m.needs)
    assert {m.name for m in plain if m.fold is None} == set(BY_HAND)


def test_random_is_seeded() -> None:
    draw = METHODS["random"].from_seed
    assert draw is not None
    first, again, other = (draw(8, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert ((first >= 0) & (first < 1)).all()


class HandMade:
    """Two experts and a gate; stands in for ``LayerWeights``."""

    def gate(self) -> torch.Tensor:
        return torch.tensor([[3.0, 4.0], [0.0, 1.0]])

    def experts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        flat = torch.full((2, 2), -2.0), torch.full((2, 1), 2.0)
        peaked = torch.tensor([[6.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 1)
        return [flat, peaked]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gate-norm", [5, 1]),
        ("weight-norm", [math.sqrt(24), 6]),
        # rms / mean|W|: entries of one size give 1; six entries, one of them 6: sqrt(6) / 1.
        ("aimer", [1, math.sqrt(6)]),
    ],
)
def test_from_weights(name: str, expected: list[float]) -> None:
    score = METHODS[name].from_weights
    assert score is not None
    np.testing.assert_allclose(score(HandMade()), expected)  # type: ignore[arg-type]


def test_an_expert_of_zeros_scores_lowest_under_aimer() -> None:
    class Zeros(HandMade):
        def experts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
            return [(torch.zeros(2, 2), torch.zeros(2, 1)), *super().experts()]

    score = METHODS["aimer"].from_weights
    assert score is not None
    assert score(Zeros())[0] == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("name", ["aimer", "weight-norm", "gate-norm"])
def test_from_checkpoints(tiny_model: Callable[..., Path], family: str, name: str) -> None:
    """The streamed scores equal those of the model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(family)
    weights = Weights(model, ModelSpec.from_path(model))
    score = METHODS[name].from_weights
    assert score is not None
    layers = AutoModelForCausalLM.from_pretrained(model).model.layers
    for index, layer in weights.layers.items():
        mlp = layers[index].mlp
        flat = torch.cat([mlp.experts.gate_up_proj.flatten(1), mlp.experts.down_proj.flatten(1)], 1)
        flat = flat.detach().double()
        expected = {
            "aimer": flat.square().mean(1).sqrt() / flat.abs().mean(1),
            "weight-norm": flat.norm(dim=1),
            "gate-norm": mlp.gate.weight.detach().double().norm(dim=1),
        }[name]
        np.testing.assert_allclose(score(layer), expected.numpy(), rtol=1e-9)


def test_registry() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    for method in METHODS.values():
        assert method.title
        assert method.choose is not None or method.formula.startswith("S_j")
        assert method.formula
        assert not method.reference or re.fullmatch(r"arXiv:\d{4}\.\d{5}", method.reference)


def test_unknown_names_get_a_hint() -> None:
    assert find_method("reap") is METHODS["reap"]
    with pytest.raises(PlanError, match=r"method is 'raep', expected one of random, .*'reap'\?"):
        find_method("raep")
    with pytest.raises(PlanError, match=r"gate-norm$"):
        find_method("zzz")


def test_a_method_has_one_source() -> None:
    with pytest.raises(ValueError, match="expected exactly one source"):
        Method("m", "t", "", "S_j")


def test_mone_by_hand() -> None:
    """Expert 0 puts out (1, 0) and (3, 4): mean (2, 2), variances (1, 4), gate mass 1/2 + 1/4."""
    found = LayerStatistics(
        sums=statistics().sums,
        max_activation=np.ones(3),
        contribution=np.ones(3),
        output_sums=np.array([[4.0, 4.0], [5.0, 0.0], [0.0, 0.0]]),
        output_squares=np.array([[10.0, 16.0], [25.0, 0.0], [0.0, 0.0]]),
    )
    score = METHODS["mone"].from_statistics
    assert score is not None
    np.testing.assert_allclose(score(found), [math.sqrt(5) * 0.75 / 3, 0, 0])
    assert METHODS["mone"].fold is not None
    layer = METHODS["mone"].fold(
        Folding(
            budget=LayerBudget(MoELayer(4, 3, 2, 3), 1, 2, 2, skipped=False),
            kept=(0,),
            scores=score(found),
            statistics=found,
            weights=None,  # type: ignore[arg-type]
            router=Router("softmax", renormalise=True),
            keep_gate_rows=True,
            options={},
        )
    )
    assert (layer.layer, layer.kept, layer.top_k) == (4, (0,), 2)
    assert layer.constants is not None
    np.testing.assert_array_equal(layer.constants, [[5, 0], [0, 0]])


def one_corpus(*norms: float) -> LayerStatistics:
    """Each expert gets one token with gate weight 1 and that norm."""
    sums = np.array([[[norm**b for b in range(3)] for _ in range(3)] for norm in norms])
    return LayerStatistics(sums, np.ones(len(norms)), np.ones(len(norms)))


def test_tb_coverage_by_hand() -> None:
    """The first corpus names 3, then 1; the second 0, then, as 3 is taken, 2."""
    score = METHODS["tb-coverage"].from_corpora
    assert score is not None
    found = score([one_corpus(1, 3, 2, 4), one_corpus(9, 1, 2, 8)])
    np.testing.assert_array_equal(found, [3, 2, 1, 4])
    np.testing.assert_array_equal(score([one_corpus(1, 3, 2, 4)]), [1, 3, 2, 4])
