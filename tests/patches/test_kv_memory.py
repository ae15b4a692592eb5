from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    compute_layout_strides,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker import utils

from liveprune.patches.kv_growth import _STATUS
from liveprune.patches.kv_memory import (
    block_regions,
    commit_blocks,
    release_blocks,
    wrap_allocate_kv_cache,
)
from liveprune.patches.live_types import KVStatus
from liveprune.patches.page_counts import Region

# As vLLM wrote it, even if another test has loaded the plugin.
allocate_kv_cache = inspect.unwrap(utils.allocate_kv_cache)
CPU = torch.device("cpu")
LAYERS = 3


def config_of(
    layout: KVCacheLayout, blocks: int, *, block_size: int = 8, heads: int = 2, groups: int = 1
) -> KVCacheConfig:
    """As vLLM plans it: groups of three layers, the groups on top of each other."""
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=heads, head_size=4, dtype=torch.bfloat16
    )
    layer_stride, block_stride, *_ = compute_layout_strides(spec, blocks, LAYERS, layout)
    names = [[f"group{g}.layer{i}" for i in range(LAYERS)] for g in range(groups)]
    return KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[
            KVCacheTensor(
                size=spec.page_size_bytes * LAYERS * blocks,
                layers=layers,
                layer_stride=layer_stride,
                block_stride=block_stride,
            )
            for layers in names
        ],
        kv_cache_groups=[KVCacheGroupSpec(layers, spec) for layers in names],
    )


def live(config: KVCacheConfig, start: int) -> KVCacheConfig:
    setattr(config, _STATUS, KVStatus(start, 1, config.num_blocks, 0))
    return config


def bytes_of_block(config: KVCacheConfig, views: dict[str, Any], block: int) -> set[int]:
    """Those that change when the block is written in every layer."""
    memory = next(iter(views.values())).untyped_storage()
    raw = torch.empty(0, dtype=torch.int8).set_(memory)
    raw.zero_()
    for view in views.values():
        parts = view.shape[0] // config.num_blocks
        view[block * parts : (block + 1) * parts] = -1.5  # bfloat16 0xbfc0: no byte is zero
    return set(raw.nonzero().flatten().tolist())


@pytest.mark.parametrize("layout", list(KVCacheLayout))
@pytest.mark.parametrize("groups", [1, 2])
def test_regions_are_the_bytes_of_a_block(layout: KVCacheLayout, groups: int) -> None:
    config = config_of(layout, 5, groups=groups)
    views = allocate_kv_cache(config, CPU, layout)
    regions = block_regions(views.values(), 5)
    for block in range(5):
        described = [
            region.offset + block * region.stride + byte
            for region in regions
            for byte in range(region.extent)
        ]
        assert len(described) == len(set(described))
        assert set(described) == bytes_of_block(config, views, block)


def test_regions_of_split_blocks() -> None:
    config = config_of(KVCacheLayout.LBNHC, 5)
    views = allocate_kv_cache(config, CPU, KVCacheLayout.LBNHC, [2])
    assert views["group0.layer0"].shape[0] == 20
    regions = block_regions(views.values(), 5)
    described = {r.offset + 3 * r.stride + byte for r in regions for byte in range(r.extent)}
    assert described == bytes_of_block(config, views, 3)


@pytest.mark.parametrize(
    ("layout", "regions"),
    [
        # A page is 8 tokens x 2 heads x (4 + 4) x 2 bytes = 256.
        (KVCacheLayout.LBHNC, [Region(i * 5 * 256, 256, 256) for i in range(3)]),
        (KVCacheLayout.BLHNC, [Region(0, 768, 768)]),
        (KVCacheLayout.BHLNC, [Region(0, 768, 768)]),
        (KVCacheLayout.LHBNC, [Region(i * 5 * 128, 128, 128) for i in range(6)]),
    ],
)
def test_regions_are_few(layout: KVCacheLayout, regions: list[Region]) -> None:
    views = allocate_kv_cache(config_of(layout, 5, groups=2), CPU, layout)
    assert block_regions(views.values(), 5) == regions


@pytest.mark.parametrize("layout", list(KVCacheLayout))
def test_the_views_are_vllms(layout: KVCacheLayout) -> None:
    config = live(config_of(layout, 5, groups=2), 3)
    views = wrap_allocate_kv_cache(allocate_kv_cache)(config, CPU, layout)
    expected = allocate_kv_cache(config, CPU, layout)
    assert list(views) == list(expected)
    for name, view in views.items():
        assert (view.dtype, view.shape) == (torch.bfloat16, expected[name].shape)
        assert view.stride() == expected[name].stride()
        assert view.storage_offset() == expected[name].storage_offset()
        assert view.untyped_storage().nbytes() == expected[name].untyped_storage().nbytes()
    assert len({view.untyped_storage().data_ptr() for view in views.values()}) == 1
    assert not any(view.any() for view in views.values())


def test_without_live_mode_vllm_allocates() -> None:
    def original(*arguments: Any) -> Any:
        return arguments

    config = config_of(KVCacheLayout.LBHNC, 5)
    wrapped = wrap_allocate_kv_cache(original)
    assert wrapped(config, CPU, KVCacheLayout.LBHNC, [8]) == (config, CPU, KVCacheLayout.LBHNC, [8])


def test_blocks_come_and_go() -> None:
    # Blocks of 4 KiB in each of three layers: a page, or half of one on larger systems.
    layout = KVCacheLayout.LBHNC
    config = live(config_of(layout, 64, block_size=64, heads=4), 16)
    views = wrap_allocate_kv_cache(allocate_kv_cache)(config, CPU, layout)
    runner = SimpleNamespace(kv_cache_config=config)
    block_bytes = LAYERS * 4096
    memory = config.liveprune_memory
    page = memory.page_bytes
    assert memory.resident_bytes == math.ceil(16 * 4096 / page) * page * LAYERS
    commit_blocks(runner, range(16, 32))
    for view in views.values():
        view[:32] = 1
    released = release_blocks(runner, range(8, 32))
    assert released == 24 * block_bytes
    assert memory.resident_bytes == 8 * block_bytes
    for view in views.values():
        assert (view[:8] == 1).all()
        assert not view[8:].any()
    assert release_blocks(runner, []) == 0
