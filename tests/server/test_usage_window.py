from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from liveprune.patches.live_counts import LayerCounts, VariantCounts
from liveprune.pruning.errors import DataError
from liveprune.server.usage_window import UsageWindow, added, routing_statistics, since


def counts(seed: int, *, tokens: float = 100, sampled: bool = True) -> VariantCounts:
    random = np.random.default_rng(seed)
    layers = {}
    for index in (0, 2):
        norms = random.uniform(0.5, 1, (4, 3, 3))
        layers[index] = LayerCounts(
            random.uniform(1, 9, (4, 3)),
            norms if sampled else None,
            random.uniform(1, 2, 4) if sampled else None,
        )
    return VariantCounts(tokens, layers)


def same(one: VariantCounts, other: VariantCounts) -> None:
    assert one.tokens == pytest.approx(other.tokens)
    assert one.layers.keys() == other.layers.keys()
    for index, layer in one.layers.items():
        for name, values in vars(layer).items():
            np.testing.assert_allclose(values, getattr(other.layers[index], name))


def test_half_of_the_weight_is_gone_after_a_half_life() -> None:
    window = UsageWindow(counts(1), updated=1000.0)
    later = window.at(1060.0, half_life=30.0)
    assert (later.updated, later.counts.tokens) == (1060.0, 25)
    assert window.tokens_at(1060.0, 30.0) == 25
    was, now = window.counts.layers[2], later.counts.layers[2]
    np.testing.assert_allclose(now.gates, was.gates / 4)
    assert was.sampled is not None
    np.testing.assert_allclose(now.sampled, was.sampled / 4)  # type: ignore[arg-type]
    assert now.largest is was.largest
    back = window.at(10.0, half_life=30.0)  # a clock that was set back
    assert back.updated == 1000.0
    same(back.counts, window.counts)


def test_differences_add_up_to_what_an_engine_counted() -> None:
    first, second = counts(1), counts(2, tokens=40)
    total = added([first, second])
    same(added([since(None, first), since(first, total)]), total)
    assert since(first, total).tokens == 40


def test_after_a_restart_all_is_new() -> None:
    before, after = counts(1), counts(2, tokens=3)
    assert since(before, after) is after


def test_a_window_without_samples_takes_those_that_come() -> None:
    window = UsageWindow(counts(1, sampled=False), 0.0).plus(counts(2))
    found, right = window.counts.layers[0].sampled, counts(2).layers[0].sampled
    assert found is not None
    assert right is not None
    assert np.array_equal(found, right)


def test_saved_and_read(tmp_path: Path) -> None:
    window = UsageWindow(counts(3), updated=12.5)
    window.save(tmp_path / "one.safetensors", "model")
    found = UsageWindow.load(tmp_path / "one.safetensors", "model")
    assert found.updated == 12.5
    same(found.counts, window.counts)
    bare = UsageWindow(counts(3, sampled=False), updated=1.0)
    bare.save(tmp_path / "two.safetensors", "model")
    assert UsageWindow.load(tmp_path / "two.safetensors", "model").counts.layers[0].sampled is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"no"), "not readable as live usage"),
        (lambda path: save_file({}, path, {"format": "other"}), "expected 'liveprune-usage-1'"),
        (lambda path: path.unlink(), "not readable"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    path = tmp_path / "x.safetensors"
    UsageWindow(counts(3), updated=12.5).save(path, "model")
    spoil(path)
    with pytest.raises(DataError, match=message):
        UsageWindow.load(path, "model")


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    UsageWindow(counts(3), updated=12.5).save(path, "model")
    with pytest.raises(DataError, match="of the model model, expected other"):
        UsageWindow.load(path, "other")


def test_statistics_of_a_whole_sample_are_the_sample() -> None:
    found = counts(4)
    layers = {}
    for index, layer in found.layers.items():
        assert layer.sampled is not None
        layers[index] = replace(layer, gates=layer.sampled[:, :, 0])
    statistics = routing_statistics(VariantCounts(9, layers), "model")
    assert (statistics.tokens, statistics.model) == (9, "model")
    for index, layer in statistics.layers.items():
        np.testing.assert_allclose(layer.sums, layers[index].sampled)  # type: ignore[arg-type]
        np.testing.assert_allclose(layer.max_activation, layers[index].largest)  # type: ignore[arg-type]
        assert np.isnan(layer.contribution).all()


def test_a_sample_is_scaled_by_each_experts_tokens() -> None:
    """By hand: expert 0 has 10 tokens, 2 in the sample; expert 1 has 6, none; expert 2 none."""
    gates = np.array([[10, 5.0, 3.0], [6, 2.0, 1.0], [0, 0, 0]])
    sampled = np.zeros((3, 3, 3))
    sampled[0] = [[2, 8, 40], [1, 4, 20], [0.5, 2, 10]]
    largest = np.array([1.5, -np.inf, -np.inf])
    found = VariantCounts(20, {0: LayerCounts(gates, sampled, largest)})
    layer = routing_statistics(found, "m").layers[0]
    np.testing.assert_allclose(layer.sums[:, :, 0], gates)
    np.testing.assert_allclose(layer.sums[0, :, 1:], 5 * sampled[0, :, 1:])
    # The layer's mean norm is 4, the mean square 20.
    np.testing.assert_allclose(layer.sums[1, :, 1], [24, 8, 4])
    np.testing.assert_allclose(layer.sums[1, :, 2], [120, 40, 20])
    assert not layer.sums[2].any()
    assert layer.max_activation.tolist() == [1.5, -np.inf, -np.inf]


@pytest.mark.parametrize("sampled", [None, np.zeros((2, 3, 3))])
def test_norms_that_nobody_measured_are_not_numbers(sampled: Any) -> None:
    largest = None if sampled is None else np.full(2, -np.inf)
    found = VariantCounts(4, {1: LayerCounts(np.ones((2, 3)), sampled, largest)})
    layer = routing_statistics(found, "m").layers[1]
    assert layer.counts.tolist() == [1, 1]
    assert np.isnan(layer.sums[:, :, 1:]).all()
    assert np.isnan(layer.max_activation).all()
