"""How many KV blocks fit beside the weights: arithmetic only.

The memory target bounds the sum of expert rows, spare rows, other weights and KV blocks. What the
expert rows do not take of it, the KV cache may have.
"""

from __future__ import annotations

from collections.abc import Iterable

from liveprune.patches.live_types import EngineMemory, KVStatus
from liveprune.patches.row_assignment import assign_rows
from liveprune.pruning.errors import EngineError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan


def weight_bytes(memory: EngineMemory) -> int:
    """Bytes of everything that the target bounds, the KV cache aside."""
    return memory.base_rows + memory.spare_rows + memory.other_weights


def total_bytes(memory: EngineMemory, kv: KVStatus) -> int:
    """What the target is held against."""
    return weight_bytes(memory) + kv.blocks * kv.block_bytes


def kv_blocks(memory: EngineMemory, kv: KVStatus, target: int) -> int:
    """Blocks that the cache should have now: what the target leaves, within the engine's bounds."""
    fitting = (target - weight_bytes(memory)) // kv.block_bytes
    return max(kv.min_blocks, min(fitting, kv.max_blocks))


def room_for_rows(memory: EngineMemory, kv: KVStatus, target: int, row_bytes: int) -> int:
    """Blocks that the cache may keep when ``row_bytes`` more rows come; never more than it has.

    Raises:
        EngineError: the rows and the smallest usable KV cache exceed the target together.
    """
    weights = weight_bytes(memory)
    least = weights + row_bytes + kv.min_blocks * kv.block_bytes
    if least > target:
        raise EngineError(
            f"memory target: {row_bytes:,} bytes of new expert rows beside {weights:,} bytes of "
            f"weights and the smallest KV cache ({kv.min_blocks} blocks, "
            f"{kv.min_blocks * kv.block_bytes:,} bytes) need {least:,} bytes, expected at most "
            f"{target:,}; remove a live variant, or allow more memory"
        )
    return min(kv.blocks, (target - weights - row_bytes) // kv.block_bytes)


def rows_to_fill(plan: Plan | None, live: Iterable[Plan | None], spec: ModelSpec) -> int:
    """Rows, over all layers, that become resident for ``plan`` beside the ``live`` plans.

    None is the base model. No variant shares the rows of its merged experts.
    """
    resident: set[tuple[int, int]] = set()
    for other in live:
        resident |= _rows(other, spec)[0]
    base, merged = _rows(plan, spec)
    return len(base - resident) + merged


def row_bytes(memory: EngineMemory, spec: ModelSpec) -> int:
    """Bytes of one expert row in one layer, over all workers, rounded up.

    Rows of all layers are equally large: the experts of every supported family are.
    """
    return -(-memory.all_base_rows // sum(layer.experts for layer in spec.layers))


def _rows(plan: Plan | None, spec: ModelSpec) -> tuple[set[tuple[int, int]], int]:
    """(layer, expert) of the base rows that a plan uses, and how many spare rows it fills."""
    base: set[tuple[int, int]] = set()
    merged = 0
    for layer in spec.layers:
        spare = range(layer.experts, 2 * layer.experts)  # a plan merges into no more than these
        recipe = None if plan is None else plan.layer(layer.index)
        assigned = assign_rows(recipe, layer.experts, spare)
        base |= {(layer.index, row) for row in assigned.needed.difference(assigned.merged)}
        merged += len(assigned.merged)
    return base, merged
