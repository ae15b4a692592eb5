"""MoEITS against the published code's outputs, and its greedy on cases worked by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from liveprune.pruning.calibration.weights import LayerWeights, Weights
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.methods.moeits import expert_nmi
from liveprune.pruning.methods.moeits_removals import removals
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.nmi import digitise, nmi

MODELS = {"mixtral_rand": torch.float16, "qwen2moe_rand": torch.bfloat16}


def layers(model: Path) -> dict[int, LayerWeights]:
    return Weights(model, ModelSpec.from_path(model)).layers


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("official", [False, True])
def test_equals_the_published_code(shared: Path, name: str, official: bool) -> None:
    """NMI to 1e-6; in float16, where bins' edges are rounded by NumPy's version, to 1e-4."""
    golden = load_file(shared / "golden" / "moeits" / f"{name}.safetensors")
    meta = json.loads((shared / "golden" / "moeits" / "meta.json").read_text())["models"][name]
    dtype = MODELS[name] if official else torch.float32
    tolerance = 1e-4 if dtype == torch.float16 else 1e-6
    found = {}
    for index, layer in layers(shared / "golden" / "ckpt" / name).items():
        matrix = expert_nmi(layer, dtype=dtype)
        expected = golden[f"nmi{'' if official else '_f32'}.L_{index}"]
        np.testing.assert_allclose(matrix, expected, rtol=0, atol=tolerance)
        found[index] = removals(matrix)
    for factor, result in meta["factors"].items():
        tau = float(factor)
        kept = [sorted(item.kept(tau, floor=1)) for item in found.values()]
        assert kept == result["official" if official else "float32"]["keep"], factor
        if not official:
            thresholds = [item.threshold(tau) for item in found.values()]
            np.testing.assert_allclose(thresholds, result["threshold_f32"], rtol=0, atol=1e-6)


def test_one_pair_in_all_its_parts(shared: Path) -> None:
    meta = json.loads((shared / "golden" / "moeits" / "meta.json").read_text())["models"]
    pair = meta["mixtral_rand"]["pair_0_1_layer0_w1"]
    experts = layers(shared / "golden" / "ckpt" / "mixtral_rand")[0].experts()
    a, b = (digitise(next(experts)[0].chunk(2)[0].numpy()) for _ in range(2))
    assert a.entropy == pytest.approx(pair["H(A)"], abs=1e-6)
    assert b.entropy == pytest.approx(pair["H(B)"], abs=1e-6)
    assert nmi(a, b) == pytest.approx(pair["NMI"], abs=1e-6)


def symmetric(**pairs: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A 4x4 matrix; ``p01=5`` is the entry of experts 0 and 1."""
    matrix = np.zeros((4, 4))
    for key, value in pairs.items():
        i, j = int(key[1]), int(key[2])
        matrix[i, j] = matrix[j, i] = value
    return matrix


def test_greedy_by_hand() -> None:
    """Sums of the rows: 14, 13, 11, 8.

    (0, 1) is the largest: 0 goes. Left 1, 2, 3 with 3 at (1, 2), 2 at (1, 3), 4 at (2, 3) and sums
    5, 7, 6: of (2, 3) 2 goes. Left (1, 3): a tie, the second, 3, goes. All entries: 8, 3 twice, 2
    and 4 four times, 0 four times; mean 46 / 16, quartiles 1.5 and 4.
    """
    found = removals(symmetric(p01=8, p02=4, p03=2, p12=3, p13=2, p23=4))
    assert found.removed == (0, 2, 3)
    assert found.nmi == (8, 4, 2)
    assert found.mean == 46 / 16
    assert found.iqr == 4 - 1.5
    assert found.scores().tolist() == [0, 3, 1, 2]


def test_row_means_shrink_with_the_matrix() -> None:
    """Of (2, 3), 3 has the larger sum at first (10.5 to 10), but not without 0: 7 to 7.5."""
    found = removals(symmetric(p01=9, p02=2.5, p03=3.5, p12=1.5, p13=1, p23=6))
    assert found.removed == (0, 2, 3)


@pytest.mark.parametrize(
    ("tau", "floor", "kept"),
    [
        (0.0, 1, {1, 3}),  # threshold 2.875: 8 and 4 are above
        (0.45, 1, {1, 2, 3}),  # threshold 4, not above 4 itself
        (0.45, 4, {0, 1, 2, 3}),
        (10.0, 1, {0, 1, 2, 3}),
        (-2.0, 1, {1}),
        (-2.0, 2, {1, 3}),
        (-2.0, 3, {1, 2, 3}),
    ],
)
def test_threshold_and_floor(tau: float, floor: int, kept: set[int]) -> None:
    found = removals(symmetric(p01=8, p02=4, p03=2, p12=3, p13=2, p23=4))
    assert found.kept(tau, floor) == kept


def test_protected_experts_stay_besides_the_others() -> None:
    found = removals(symmetric(p01=8, p02=4, p03=2, p12=3, p13=2, p23=4))
    assert found.kept(0.0, 1, protected=(0,)) == {0, 1, 3}


def test_ties() -> None:
    """All alike: of the first pair the second expert goes, again and again; also all 0."""
    for value in (0.0, 0.5):
        alike = value * (1 - np.eye(4))
        assert removals(alike).removed == (1, 2, 3)
    assert removals(np.zeros((1, 1))).removed == ()
    assert removals(np.zeros((1, 1))).scores().tolist() == [0]


def test_equals_the_loop_as_published() -> None:
    """Deleting until nothing is above the threshold, on many random matrices."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        matrix = rng.random((9, 9))
        matrix = np.triu(matrix, 1) + np.triu(matrix, 1).T
        found = removals(matrix)
        for tau in (0.0, 0.25, 0.5, 1.0):
            spread = np.quantile(matrix, 0.75) - np.quantile(matrix, 0.25)
            limit = matrix.mean() + tau * spread
            left, rest = list(range(9)), matrix
            while (rest > limit).any():
                a, b = np.unravel_index(np.argmax(rest), rest.shape)
                gone = int(a if rest[a].mean() > rest[b].mean() else b)
                del left[gone]
                rest = np.delete(np.delete(rest, gone, 0), gone, 1)
            assert found.kept(tau, floor=1) == set(left)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v2"])
def test_shares_of_the_matrices(tiny_model: Callable[..., Path], family: str) -> None:
    layer = next(iter(layers(tiny_model(family)).values()))
    (gate_up_0, down_0), (gate_up_1, down_1) = list(layer.experts())[:2]
    gate_0, up_0 = gate_up_0.chunk(2)
    gate_1, up_1 = gate_up_1.chunk(2)
    values = [
        nmi(digitise(a.float().numpy()), digitise(b.float().numpy()))
        for a, b in ((gate_0, gate_1), (up_0, up_1), (down_0, down_1))
    ]
    shares = [1 / 3] * 3 if family == "mixtral" else [0.2, 0.4, 0.4]
    assert expert_nmi(layer)[0, 1] == pytest.approx(np.dot(shares, values), abs=1e-12)


def test_controls_are_seeded_by_seed_and_layer(tiny_model: Callable[..., Path]) -> None:
    first, second = list(layers(tiny_model("mixtral")).values())[:2]
    null = expert_nmi(first, estimator="shuffled", seed=1)
    assert np.array_equal(null, expert_nmi(first, estimator="shuffled", seed=1))
    assert not np.array_equal(null, expert_nmi(first, estimator="shuffled", seed=2))
    assert not np.array_equal(null, expert_nmi(second, estimator="shuffled", seed=1))


def test_the_error_names_the_matrix() -> None:
    class Broken:
        architecture = type("A", (), {"model_type": "mixtral"})
        tensors = type("T", (), {"layer": type("L", (), {"index": 7, "experts": 2})})

        def experts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
            good = torch.arange(8.0).reshape(4, 2), torch.arange(4.0).reshape(2, 2)
            return [good, (good[0].index_fill(0, torch.tensor([3]), torch.nan), good[1])]

    with pytest.raises(CheckpointError, match="layer 7, expert 1, up: found NaN"):
        expert_nmi(Broken())  # type: ignore[arg-type]
