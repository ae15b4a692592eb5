"""On vLLM's own BlockPool."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    make_block_hash_with_group_id,
    maybe_convert_block_hash,
)

from liveprune.patches.kv_pool import KVPool
from liveprune.pruning.errors import EngineError


def make(blocks: int, most: int, least: int = 2) -> tuple[BlockPool, KVPool]:
    pool = BlockPool(blocks, enable_caching=True, hash_block_size=16, enable_kv_cache_events=True)
    return pool, KVPool(pool, max_blocks=most, block_bytes=1024, min_blocks=least)


def cache(pool: BlockPool, block: Any, text: str) -> None:
    """As a full block is cached, its content known by ``text``."""
    key = make_block_hash_with_group_id(BlockHash(text.encode()), 0)
    pool._insert_block_hash(key, block, num_tokens=16)


def cached(pool: BlockPool, text: str) -> Any:
    return pool.get_cached_block(BlockHash(text.encode()), [0])


def free_ids(pool: BlockPool) -> list[int]:
    """From the front of the queue; walked both ways, so a broken link shows."""
    queue = pool.free_block_queue
    ids = [block.block_id for block in queue.get_all_free_blocks()]
    back, block = [], queue.fake_free_list_tail.prev_free_block
    while block is not queue.fake_free_list_head:
        assert block is not None
        back.append(block.block_id)
        block = block.prev_free_block
    assert back[::-1] == ids
    assert len(ids) == pool.get_num_free_blocks()
    return ids


def test_grown_blocks_can_be_used() -> None:
    pool, kv = make(4, most=10)
    used = pool.get_new_blocks(3)
    assert kv.next_blocks(7) == [4, 5, 6]
    assert kv.blocks == 4
    assert kv.grow(7) == [4, 5, 6]
    assert kv.status() == {
        "blocks": 7,
        "min_blocks": 2,
        "max_blocks": 10,
        "block_bytes": 1024,
    }
    assert pool.get_usage() == 0.5  # 3 of 6
    more = pool.get_new_blocks(3)
    assert [block.block_id for block in more] == [4, 5, 6]
    assert pool.get_usage() == 1.0
    pool.free_blocks([*used, *more])
    assert sorted(free_ids(pool)) == [1, 2, 3, 4, 5, 6]


def test_new_blocks_are_used_before_cached_ones_are_evicted() -> None:
    pool, kv = make(3, most=6)
    blocks = pool.get_new_blocks(2)
    cache(pool, blocks[0], "a")
    cache(pool, blocks[1], "b")
    pool.free_blocks(blocks)
    kv.grow(5)
    pool.get_new_blocks(2)
    assert cached(pool, "a") == [blocks[0]]
    assert cached(pool, "b") == [blocks[1]]


def test_shrink_takes_the_highest_free_blocks_and_leaves_those_in_use() -> None:
    pool, kv = make(8, most=8)
    used = pool.get_new_blocks(7)
    pool.free_blocks(used[:2] + used[4:6])  # in use: 3, 4, 7
    assert kv.shrink(6) == [5, 6]
    assert pool.get_usage() == pytest.approx(3 / 5)
    assert kv.shrink(2) == [1, 2]
    assert kv.blocks == 4
    assert free_ids(pool) == []
    assert pool.get_usage() == 1.0
    pool.free_blocks([used[6]])
    assert kv.shrink(2) == [7]
    assert kv.shrink(2) == []


def test_the_null_block_stays() -> None:
    pool, kv = make(5, most=5, least=1)
    assert kv.shrink(1) == [1, 2, 3, 4]
    assert pool.get_usage() == 0
    assert pool.null_block.block_id == 0
    assert kv.blocks == 1


def test_a_cached_block_is_evicted_as_vllm_evicts() -> None:
    pool, kv = make(5, most=5)
    blocks = pool.get_new_blocks(4)
    for block, text in zip(blocks, "abcd", strict=True):
        cache(pool, block, text)
    cache(pool, blocks[3], "second name")
    pool.free_blocks(blocks)
    pool.take_events()
    assert kv.shrink(3) == [3, 4]
    assert [cached(pool, text) for text in ("c", "d", "second name")] == [None] * 3
    assert cached(pool, "a") == [blocks[0]]
    removed = {event.block_hashes[0] for event in pool.take_events()}
    names = ("c", "d", "second name")
    assert removed == {maybe_convert_block_hash(BlockHash(name.encode())) for name in names}
    kv.grow(5)
    back = pool.get_new_blocks(2)
    assert [(block.block_id, block.block_hash) for block in back] == [(3, None), (4, None)]
    assert pool.take_events() == []


def test_blocks_out_of_service_come_back_lowest_first_then_new_ones() -> None:
    _, kv = make(6, most=9)
    assert kv.shrink(3) == [3, 4, 5]
    assert kv.grow(5) == [3, 4]
    assert kv.next_blocks(8) == [5, 6, 7]
    assert kv.grow(8) == [5, 6, 7]
    assert kv.blocks == 8


def test_a_reader_of_a_free_block_is_told() -> None:
    pool, kv = make(4, most=4)
    told: list[int] = []
    pool.unpin_blocks(pool.get_new_blocks(3), lambda block: told.append(block.block_id))
    kv.shrink(2)
    assert sorted(told) == [2, 3]


def test_the_prefix_cache_can_be_reset_whatever_the_size() -> None:
    pool, kv = make(6, most=9)
    kv.shrink(3)
    assert pool.reset_prefix_cache()
    kv.grow(9)
    assert pool.reset_prefix_cache()


@pytest.mark.parametrize("blocks", [2, 10])
def test_sizes_out_of_bounds_are_refused(blocks: int) -> None:
    pool, kv = make(5, most=9, least=3)
    for action in (kv.grow, kv.shrink, kv.next_blocks):
        with pytest.raises(EngineError, match=f"found a size of {blocks} .* expected 3 to 9"):
            action(blocks)
    assert free_ids(pool) == [1, 2, 3, 4]


@pytest.mark.parametrize("blocks", [3, 5])
def test_the_other_direction_is_nothing_to_do(blocks: int) -> None:
    pool, kv = make(4, most=9)
    action = kv.grow if blocks < 4 else kv.shrink
    assert action(blocks) == []
    assert free_ids(pool) == [1, 2, 3]


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["take", "free", "grow", "shrink"]), st.integers(0, 11)), max_size=30
)


@given(ACTIONS)
def test_every_block_is_free_or_in_use_or_out_of_service(actions: list[tuple[str, int]]) -> None:
    pool, kv = make(5, most=12)
    used: list[Any] = []
    out: set[int] = set()
    made = 5
    for step, (action, number) in enumerate(actions):
        if action == "take":
            taken = pool.get_new_blocks(min(number, pool.get_num_free_blocks()))
            for block in taken:
                cache(pool, block, f"{step}-{block.block_id}")
            used += taken
        elif action == "free":
            pool.free_blocks(used[:number])
            used = used[number:]
        elif action == "grow":
            ids = kv.grow(max(2, number))
            fresh = {i for i in ids if i >= made}
            assert set(ids) - fresh <= out
            made, out = made + len(fresh), out - set(ids)
        else:
            before = set(free_ids(pool))
            ids = kv.shrink(max(2, number))
            assert set(ids) == set(sorted(before)[len(before) - len(ids) :])
            out |= set(ids)
        free, busy = set(free_ids(pool)), {block.block_id for block in used}
        assert not free & busy
        assert free | busy | out | {0} == set(range(made))
        assert not (free | busy) & out
        assert kv.blocks == made - len(out)
        assert all(pool.blocks[i].block_hash is None for i in out)
        assert pool.get_usage() == pytest.approx(len(busy) / max(1, kv.blocks - 1))
