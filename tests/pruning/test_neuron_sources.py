from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.neuron_sources import neuron_sources, only_source


def layer(neuron_map: list[list[int]], shares: list[float], kept: tuple[int, ...]) -> LayerPlan:
    experts = len(neuron_map)
    return LayerPlan(
        0, experts, 1, kept, neuron_map=np.array(neuron_map), neuron_shares=np.array(shares)
    )


def test_by_hand() -> None:
    """New expert 0 is old 0 as it is; new 1 is old 2 with neuron 0 of old 1 on its neuron 1."""
    made = layer([[0, 1], [3, -1], [2, 3]], [1, 1, 3], (0, 2))
    assert only_source(made, 0) == 0
    assert only_source(made, 1) is None
    first, second = neuron_sources(made, 1)
    assert (first.expert, first.neurons.tolist(), first.targets.tolist()) == (1, [0], [1])
    assert first.weights.tolist() == [0.25]
    assert (second.expert, second.targets.tolist()) == (2, [0, 1])
    assert second.weights.tolist() == [1, 0.75]
    (part,) = neuron_sources(made, 1, first=0, size=1)
    assert (part.expert, part.neurons.tolist(), part.targets.tolist()) == (2, [0], [0])


def test_a_permutation_is_no_copy_and_no_share_no_source() -> None:
    assert only_source(layer([[1, 0], [-1, -1]], [1, 1], (0,)), 0) is None
    assert only_source(layer([[0, 1], [1, 0]], [1, 0], (0,)), 0) == 0
    with pytest.raises(ValueError, match="no neuron map"):
        neuron_sources(LayerPlan(0, 2, 1, (0,)), 0)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32), st.data())
def test_weights_of_each_neuron_sum_to_one(
    experts: int, ffn: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    new = data.draw(st.integers(1, experts))
    neuron_map = rng.integers(-1, new * ffn, (experts, ffn))
    neuron_map[:new] = np.arange(new * ffn).reshape(new, ffn)
    made = layer(neuron_map.tolist(), rng.uniform(0.5, 2, experts).tolist(), tuple(range(new)))
    first = data.draw(st.integers(0, ffn - 1))
    size = data.draw(st.integers(1, ffn - first))
    for j in range(new):
        total = np.zeros(size)
        for source in neuron_sources(made, j, first, size):
            np.add.at(total, source.targets, source.weights)
            assert (
                neuron_map[source.expert, source.neurons] == j * ffn + first + source.targets
            ).all()
        np.testing.assert_allclose(total, 1, rtol=1e-6)
