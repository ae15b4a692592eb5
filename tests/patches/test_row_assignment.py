from __future__ import annotations

import numpy as np
import pytest

from liveprune.patches.row_assignment import assign_rows
from liveprune.pruning.errors import EngineError
from liveprune.pruning.plan import LayerPlan


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
