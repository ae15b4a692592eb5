"""The KV blocks in the scheduler's service: more or fewer of them while requests run."""

from __future__ import annotations

import heapq
from dataclasses import asdict
from typing import Any

from liveprune.patches.live_types import KVStatus
from liveprune.pruning.errors import EngineError


class KVPool:
    """Resizes vLLM's BlockPool between two steps of the engine.

    Ids below ``max_blocks`` are in service, out of it, or not made yet; blocks in use stay.
    """

    def __init__(self, block_pool: Any, max_blocks: int, block_bytes: int, min_blocks: int) -> None:
        """``block_pool``: vLLM's; it has at most ``max_blocks`` and at least ``min_blocks``."""
        self._pool = block_pool
        self.max_blocks = max_blocks
        self.min_blocks = min_blocks
        self._block_bytes = block_bytes
        self._out_of_service: list[int] = []
        """Ids that ``shrink`` took, lowest first (a heap)."""

    @property
    def blocks(self) -> int:
        """Blocks in service, the null block included."""
        return int(self._pool.num_gpu_blocks)

    def status(self) -> dict[str, int]:
        """The fields of ``KVStatus``."""
        return asdict(KVStatus(self.blocks, self.min_blocks, self.max_blocks, self._block_bytes))

    def next_blocks(self, blocks: int) -> list[int]:
        """The ids that ``grow(blocks)`` would put in service: the workers commit them first."""
        wanted = self._checked(blocks) - self.blocks
        back = heapq.nsmallest(wanted, self._out_of_service)
        made = len(self._pool.blocks)
        return [*back, *range(made, made + wanted - len(back))]

    def grow(self, blocks: int) -> list[int]:
        """Have ``blocks`` in service; returns the ids that are new there, lowest first.

        Raises:
            EngineError: not between ``min_blocks`` and ``max_blocks``.
        """
        from vllm.v1.core.kv_cache_utils import KVCacheBlock

        ids = self.next_blocks(blocks)
        for block_id in ids:
            if block_id == len(self._pool.blocks):
                self._pool.blocks.append(KVCacheBlock(block_id, pool=self._pool))
            else:
                heapq.heappop(self._out_of_service)
        # Empty blocks are used up before cached prefixes are evicted.
        self._pool.free_block_queue.prepend_n([self._pool.blocks[i] for i in ids])
        self._pool.num_gpu_blocks += len(ids)
        return ids

    def shrink(self, blocks: int) -> list[int]:
        """Take free blocks out of service until ``blocks`` are left; the highest ids first.

        Blocks in use stay: where that leaves too many, call again later. A cached prefix that loses
        a block is no longer found. Returns the ids taken, lowest first; the workers release them
        after the steps that were scheduled before.

        Raises:
            EngineError: not between ``min_blocks`` and ``max_blocks``.
        """
        excess = self.blocks - self._checked(blocks)
        if excess <= 0:
            return []
        queue = self._pool.free_block_queue
        taken = heapq.nlargest(excess, queue.get_all_free_blocks(), key=lambda x: x.block_id)
        for block in taken:
            queue.remove(block)
        # As ``get_new_blocks`` does: no reader, no hash and no metric stays behind.
        self._pool._notify_reuse(taken)  # noqa: SLF001
        for block in taken:
            self._pool._maybe_evict_cached_block(block)  # noqa: SLF001
            heapq.heappush(self._out_of_service, block.block_id)
        self._pool.num_gpu_blocks -= len(taken)
        return sorted(block.block_id for block in taken)

    def _checked(self, blocks: int) -> int:
        if not self.min_blocks <= blocks <= self.max_blocks:
            raise EngineError(
                f"KV cache: found a size of {blocks} blocks, "
                f"expected {self.min_blocks} to {self.max_blocks}"
            )
        return blocks
