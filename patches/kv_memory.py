"""The worker's KV cache in elastic memory: pages come with the blocks in use, and go with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from liveprune.patches.compat import Seam
from liveprune.patches.elastic_memory import ElasticTensor, elastic_bytes
from liveprune.patches.kv_growth import kv_status
from liveprune.patches.page_counts import Region

ALLOCATE = Seam(
    "vllm.v1.worker.utils",
    "allocate_kv_cache",
    ("kv_cache_config", "device", "layout", "kernel_block_sizes"),
)
ALLOCATE_USERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.attn_utils")

_MEMORY = "liveprune_memory"
"""Attribute of the KVCacheConfig that a model runner holds."""


def wrap_allocate_kv_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    """Back the cache by elastic memory, with the scheduler's blocks committed."""

    def allocate_kv_cache(
        kv_cache_config: Any, device: Any, layout: Any, kernel_block_sizes: Any = None
    ) -> dict[str, torch.Tensor]:
        status = kv_status(kv_cache_config)
        if status is None:
            return original(  # type: ignore[no-any-return]
                kv_cache_config, device, layout, kernel_block_sizes
            )
        # vLLM lays the views out, on a device without memory; they are then moved to ours.
        views = original(kv_cache_config, torch.device("meta"), layout, kernel_block_sizes)
        size = kv_cache_config.kv_cache_tensors[0].size
        blocks = kv_cache_config.num_blocks
        memory = elastic_bytes(size, blocks, block_regions(views.values(), blocks), device)
        memory.commit(range(status.blocks))
        setattr(kv_cache_config, _MEMORY, memory)
        storage = memory.tensor.untyped_storage()
        return {
            name: torch.empty(0, dtype=view.dtype, device=memory.tensor.device).set_(
                storage, view.storage_offset(), view.shape, view.stride()
            )
            for name, view in views.items()
        }

    return allocate_kv_cache


def commit_blocks(model_runner: Any, ids: Iterable[int]) -> None:
    """Give blocks memory, before the scheduler may use them.

    Raises:
        EngineError: no memory is left; then nothing has changed.
    """
    _memory(model_runner).commit(ids)


def release_blocks(model_runner: Any, ids: Iterable[int]) -> int:
    """Take the memory of blocks that the scheduler no longer uses; returns the bytes given back.

    Blocks smaller than a page share it: it goes with the last of them.
    """
    return _memory(model_runner).release(ids)


def block_regions(views: Iterable[torch.Tensor], blocks: int) -> list[Region]:
    """Where the bytes of a block lie, over all layers.

    Args:
        views: of every layer, [blocks * n, ...]: a block is n neighbours (kernel blocks).
        blocks: how many blocks there are.
    """
    regions = {region for view in views for region in _view_regions(view, blocks)}
    joined: list[Region] = []
    # Layers inside a block join up to the whole block; cache groups lie on top of each other.
    for region in sorted(regions, key=lambda x: (x.stride, x.offset)):
        last = joined[-1] if joined else None
        if last and last.stride == region.stride and region.offset <= last.offset + last.extent:
            end = max(last.offset + last.extent, region.offset + region.extent)
            joined[-1] = Region(last.offset, last.stride, end - last.offset)
        else:
            joined.append(region)
    return joined


def _view_regions(view: torch.Tensor, blocks: int) -> list[Region]:
    """One region for each run of bytes of a block that lies apart from the others."""
    item, parts = view.element_size(), view.shape[0] // blocks
    inside = [
        (stride * item, size)
        for stride, size in zip(view.stride(), (parts, *view.shape[1:]), strict=True)
        if size > 1
    ]
    extent = item
    apart: list[range] = []
    for stride, size in sorted(inside):
        if stride == extent and not apart:
            extent *= size
        else:
            apart.append(range(0, stride * size, stride))
    start = int(view.storage_offset()) * item
    return [
        Region(start + sum(offsets), parts * view.stride(0) * item, extent)
        for offsets in itertools.product(*apart)
    ]


def _memory(model_runner: Any) -> ElasticTensor:
    memory: ElasticTensor = getattr(model_runner.kv_cache_config, _MEMORY)
    return memory
