from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from liveprune.patches.live_types import EngineMemory, KVStatus
from liveprune.pruning.errors import EngineError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.server.memory_budget import (
    kv_blocks,
    room_for_rows,
    row_bytes,
    rows_to_fill,
    total_bytes,
)
from tests.server.fake_engine import fake_base, fake_plan

# Weights 600 + 100 + 300 = 1000 bytes, KV 10 * 50 = 500.
MEMORY = EngineMemory(600, 100, 2400, 300, process=0)
KV = KVStatus(blocks=10, min_blocks=2, max_blocks=40, block_bytes=50)


def test_what_the_target_is_held_against() -> None:
    assert total_bytes(MEMORY, KV) == 1500


@pytest.mark.parametrize(
    ("target", "blocks"),
    [
        (1500, 10),
        (1549, 10),  # not yet a whole block more
        (1550, 11),
        (1250, 5),
        (1099, 2),  # one would fit; two are the least
        (900, 2),
        (10_000, 40),  # the most
    ],
)
def test_blocks_to_have(target: int, blocks: int) -> None:
    assert kv_blocks(MEMORY, KV, target) == blocks


@pytest.mark.parametrize(
    ("rows", "target", "blocks"),
    [
        (0, 1500, 10),
        (1, 1500, 9),
        (50, 1500, 9),
        (51, 1500, 8),
        (400, 1500, 2),  # exactly the least
        (100, 1700, 10),  # room without shrinking
        (0, 9000, 10),  # never grows
    ],
)
def test_room_for_rows(rows: int, target: int, blocks: int) -> None:
    assert room_for_rows(MEMORY, KV, target, rows) == blocks


def test_rows_that_do_not_fit_are_refused_with_the_numbers() -> None:
    with pytest.raises(EngineError, match=r"401 bytes .* 1,000 bytes .*1,501 .* most 1,500"):
        room_for_rows(MEMORY, KV, 1500, 401)


def test_bytes_of_a_row(tmp_path: Path) -> None:
    spec = ModelSpec.from_path(fake_base(tmp_path))  # 3 layers of 8 experts
    assert row_bytes(MEMORY, spec) == 100
    assert row_bytes(replace(MEMORY, all_base_rows=2401), spec) == 101


def test_rows_to_fill(tmp_path: Path) -> None:
    spec = ModelSpec.from_path(fake_base(tmp_path))
    a, b = fake_plan([0, 1, 2, 3]), fake_plan([3, 4], [3, 4], [0, 1])
    assert rows_to_fill(None, [], spec) == 24
    assert rows_to_fill(a, [], spec) == 12
    assert rows_to_fill(a, [None], spec) == 0
    assert rows_to_fill(b, [a], spec) == 2  # expert 4 of the layers 0 and 1
    assert rows_to_fill(None, [a, b], spec) == 24 - 12 - 2


def test_merged_experts_take_spare_rows_unless_they_are_one_expert(tmp_path: Path) -> None:
    spec = ModelSpec.from_path(fake_base(tmp_path))
    merge = np.zeros((3, 8), np.float32)
    merge[0, 5] = 1  # expert 5 as it is
    merge[1, 5] = 0.5
    merge[2, 6] = merge[2, 7] = 0.5
    pruned = LayerPlan(0, 8, 1, kept=(1,)), LayerPlan(1, 8, 1, kept=(1,))
    merged = LayerPlan(2, 8, 1, merge=merge, router_map=np.ones((3, 8), np.float32))
    plan = Plan("mixtral", 3, (*pruned, merged), Lineage("test"))
    assert rows_to_fill(plan, [], spec) == 1 + 1 + 3
    assert rows_to_fill(plan, [None], spec) == 2
    assert rows_to_fill(plan, [plan], spec) == 2  # no variant shares them
    assert rows_to_fill(fake_plan([5]), [plan], spec) == 2
