from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from liveprune.patches.routing_tables import LayerTables
from liveprune.patches.row_assignment import assign_rows
from liveprune.pruning.errors import EngineError
from liveprune.pruning.plan import LayerPlan
from tests.forms import random_neurons


def test_the_base_uses_its_own_rows() -> None:
    found = assign_rows(None, 4, [4, 5])
    assert (found.rows, found.merged, found.coefficients) == ((0, 1, 2, 3), (), None)


def test_kept_experts_stay_where_they_are() -> None:
    found = assign_rows(LayerPlan(0, 4, 1, kept=(1, 3)), 4, [])
    assert found.rows == (1, 3)
    assert found.needed == {1, 3}


def test_only_true_mixtures_take_spare_rows() -> None:
    merge = np.array([[0, 1, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 2, 0]], np.float32)
    found = assign_rows(LayerPlan(0, 4, 1, merge=merge, router_map=merge), 4, [6, 7, 5])
    assert found.rows == (1, 6, 7), "a weight of 2 is no copy"
    assert found.merged == (6, 7)
    assert found.coefficients is not None
    np.testing.assert_array_equal(found.coefficients, merge[1:])


def test_one_hot_merge_needs_no_spare_row() -> None:
    one_hot = np.eye(4, dtype=np.float32)[[2, 0]]
    found = assign_rows(LayerPlan(0, 4, 1, merge=one_hot, router_map=one_hot), 4, [])
    assert (found.rows, found.merged, found.coefficients) == ((2, 0), (), None)


def test_too_few_spare_rows_are_refused_by_number() -> None:
    mixed = np.full((3, 4), 0.25, np.float32)
    plan = LayerPlan(5, 4, 1, merge=mixed, router_map=mixed)
    with pytest.raises(EngineError, match="layer 5: the plan merges 3 experts, found 2 free"):
        assign_rows(plan, 4, [4, 5])


def test_constants_need_the_kept_rows_only() -> None:
    plan = LayerPlan(0, 4, 1, kept=(1, 3), constants=np.ones((2, 5)))
    found = assign_rows(plan, 4, [])
    assert (found.rows, found.merged, found.coefficients) == ((1, 3), (), None)


# Gathered neuron by neuron


def neurons(
    neuron_map: Sequence[Sequence[int]], shares: Sequence[float], **routing: Sequence[int]
) -> LayerPlan:
    made = {"neuron_map": np.array(neuron_map), "neuron_shares": np.array(shares), **routing}
    return LayerPlan(3, len(neuron_map), 1, **made)  # type: ignore[arg-type]


def test_gathered_by_hand() -> None:
    """Two neurons each. New 0 is old 2 as it is, and takes no row.

    New 1 is old 0 with half of old 3. New 2 is old 1 the other way round: to a row, a permutation
    is another expert.
    """
    plan = neurons([[2, 3], [5, 4], [0, 1], [-1, 3]], [1, 1, 1, 1], kept=(0, 1, 2))
    found = assign_rows(plan, 4, [6, 4, 5])
    assert found.rows == (2, 6, 4)
    assert found.merged == (6, 4)
    assert found.needed == {2, 4, 6}
    assert found.coefficients is None
    assert found.neurons is not None
    assert found.neurons.plan is plan
    assert (found.neurons.rows, found.neurons.experts) == ((6, 4), (1, 2))
    assert [found.neurons.new_expert(row) for row in (4, 6)] == [2, 1]
    tables = LayerTables(2, 4, 3, 2, device="cpu")
    tables.write(1, plan, found.rows)
    assert tables.row_of[1, :3].tolist() == [2, 6, 4], "gate rows 0, 1 and 2"
    assert tables.needed_rows(1) == found.needed


def test_the_gate_of_the_base_is_sent_to_gathered_rows() -> None:
    """As above under an expert map: old 0 and 3 have their work done by new 1."""
    plan = neurons([[2, 3], [5, 4], [0, 1], [-1, 3]], [1, 1, 1, 1], expert_map=(1, 2, 0, 1))
    found = assign_rows(plan, 4, [4, 5])
    assert found.rows == (2, 4, 5)
    tables = LayerTables(2, 4, 3, 2, device="cpu")
    tables.write(1, plan, found.rows)
    assert tables.row_of[1].tolist() == [4, 5, 2, 4]
    assert tables.needed_rows(1) == found.needed


def test_copies_neuron_by_neuron_need_no_spare_row() -> None:
    """Old 0 gives to new 0, too, but has no share in it."""
    plan = neurons([[1, 0], [0, 1], [2, 3]], [0, 0.25, 7], kept=(1, 2))
    found = assign_rows(plan, 3, [])
    assert (found.rows, found.merged, found.neurons) == ((1, 2), (), None)


def test_too_few_spare_rows_for_gathered_experts_are_refused_by_number() -> None:
    plan = neurons([[2, 3], [5, 4], [0, 1], [-1, 3]], [1, 1, 1, 1], kept=(0, 1, 2))
    with pytest.raises(EngineError, match="layer 3: the plan merges 2 experts, found 1 free"):
        assign_rows(plan, 4, [4])


@pytest.mark.parametrize("seed", range(10))
def test_gathered_experts_against_a_loop(seed: int) -> None:
    """A new expert is an old one where every neuron comes from the same place of it alone."""
    rng = np.random.default_rng(seed)
    experts, count, size = 6, 4, 3
    neuron_map = random_neurons(rng, experts, count, size)
    if seed % 2:  # all old ones of new expert 1 are one, in order
        first = int(np.flatnonzero((neuron_map // size == 1).all(axis=1))[0])
        neuron_map[neuron_map // size == 1] = -1
        neuron_map[first] = size + np.arange(size)
    shares = rng.uniform(0.5, 2, experts)
    plan = neurons(neuron_map.tolist(), shares.tolist(), kept=range(count))
    free, expected, mixed = [9, 7, 8, 6], [], []
    for new in range(count):
        origins = [
            (old, neuron, int(neuron_map[old, neuron]) % size)
            for old in range(experts)
            for neuron in range(size)
            if neuron_map[old, neuron] // size == new
        ]
        olds = {old for old, _, _ in origins}
        if len(olds) == 1 and all(neuron == target for _, neuron, target in origins):
            expected.append(olds.pop())
        else:
            expected.append(free[len(mixed)])
            mixed.append(new)
    found = assign_rows(plan, experts, free)
    assert 2 <= len(mixed) <= 3
    assert list(found.rows) == expected
    assert list(found.merged) == free[: len(mixed)]
    assert (found.neurons is not None) == bool(mixed)
    if found.neurons is not None:
        assert found.neurons.experts == tuple(mixed)
