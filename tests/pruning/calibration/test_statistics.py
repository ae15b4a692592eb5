from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from liveprune.pruning.calibration.statistics import LayerStatistics, RoutingStatistics
from liveprune.pruning.errors import DataError


def layer_of(*experts: list[tuple[float, float]], largest: list[float]) -> LayerStatistics:
    """Statistics of experts given as lists of (g, ||f||)."""
    sums = np.zeros((len(experts), 3, 3))
    for j, tokens in enumerate(experts):
        for a in range(3):
            for b in range(3):
                sums[j, a, b] = sum(g**a * norm**b for g, norm in tokens)
    return LayerStatistics(sums, np.array(largest), np.arange(float(len(experts))))


def test_saliency_by_hand() -> None:
    layer = layer_of([(0.5, 2.0), (0.25, 4.0)], [(1.0, 3.0)], [], largest=[1, 2, -np.inf])
    assert layer.counts.tolist() == [2, 1, 0]
    assert layer.saliency(0, 1, 0).tolist() == [0.75, 1, 0]
    assert layer.saliency(0, 0, 1).tolist() == [6, 3, 0]
    assert layer.saliency(0, 2, 2).tolist() == [2, 9, 0]
    assert layer.saliency(1, 1, 1).tolist() == [1, 3, -np.inf]
    assert layer.saliency(1, 0, 2).tolist() == [10, 9, -np.inf]


def four_layers(*largest: list[float]) -> RoutingStatistics:
    layers = {
        i: layer_of(*[[(1.0, 1.0)]] * len(values), largest=values)
        for i, values in enumerate(largest, start=1)
    }
    return RoutingStatistics(layers, tokens=7, calibration="c", model="m")


def test_super_experts_stand_out_and_sit_early() -> None:
    quiet = [1.0, 1.0, 1.0, -np.inf]
    found = four_layers([1.0, 90.0, 1.0, 1.0], quiet, quiet, [1.0, 1.0, 100.0, 1.0])
    # The 99.5th percentile lies between 90 and 100: only layer 4's expert exceeds it, too late.
    assert found.super_experts() == {}
    many = [1.0] * 400
    found = four_layers([1.0, 90.0, *many], many, [95.0, *many], [1.0, 100.0, *many])
    # Of 1605 experts 3 stand out, fewer than 0.5%; the last quarter of the layers is left out.
    assert found.super_experts() == {1: (1,), 3: (0,)}


def test_super_experts_need_a_tenth_of_the_maximum() -> None:
    spread = [i / 1000 for i in range(1000)]
    found = four_layers([*spread, 50.0], spread, spread, spread)
    assert found.super_experts() == {1: (1000,)}


def test_save_and_load(tmp_path: Path) -> None:
    before = four_layers([1.0, 2.0], [3.0, -np.inf], [5.0], [6.0])
    before.save(tmp_path / "s.safetensors")
    after = RoutingStatistics.load(tmp_path / "s.safetensors")
    assert (after.tokens, after.calibration, after.model) == (7, "c", "m")
    assert list(after.layers) == [1, 2, 3, 4]
    for i, layer in before.layers.items():
        for name in ("sums", "max_activation", "contribution"):
            assert np.array_equal(getattr(layer, name), getattr(after.layers[i], name))


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_file({"a": np.zeros(1)}, path)
    with pytest.raises(DataError, match="format is None, expected 'liveprune-statistics-2'"):
        RoutingStatistics.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="not readable as routing statistics"):
        RoutingStatistics.load(path)
