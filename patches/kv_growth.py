"""How many KV blocks there are: fewer for the scheduler than the workers have addresses for.

vLLM computes the number of blocks once. In live mode the workers' part of its answer is planned
again for the greatest number that released expert rows could ever pay for, since the distance
between layers depends on it; the scheduler starts with vLLM's own number, and ``KVPool`` moves it.
Of what else in vLLM remembers the number, two things are told (``cache_config.num_gpu_blocks`` in
the worker, and the pool), and these keep the number at start: ``kv_cache_size_tokens``,
``kv_cache_max_concurrency`` and the gauge ``vllm:cache_config_info``, which only report it, and
``KVCacheManager.watermark_blocks``, a share of the blocks to keep free (none by default).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from liveprune.patches.compat import Seam
from liveprune.patches.kv_pool import KVPool
from liveprune.patches.live_config import live_config
from liveprune.patches.live_types import KVStatus
from liveprune.pruning.errors import EngineError

GET_CONFIGS = Seam(
    "vllm.v1.core.kv_cache_utils",
    "get_kv_cache_configs",
    ("vllm_config", "kv_cache_specs", "available_memory"),
)
SCHEDULER_CONFIG = Seam(
    "vllm.v1.core.kv_cache_utils", "generate_scheduler_kv_cache_config", ("kv_cache_configs",)
)
CONFIG_USERS = ("vllm.v1.engine.core",)
"""Modules that bind both by name."""
INITIALIZE = Seam(
    "vllm.v1.worker.gpu_worker", "Worker.initialize_from_config", ("self", "kv_cache_config")
)

_STATUS = "liveprune_kv"
"""Attribute of vLLM's KVCacheConfig; it travels to the workers with it."""


def kv_status(kv_cache_config: Any) -> KVStatus | None:
    """The numbers of blocks at start; None without live mode."""
    status: KVStatus | None = getattr(kv_cache_config, _STATUS, None)
    return status


def kv_pool_of(core: Any) -> KVPool:
    """The pool of vLLM's EngineCore, one for the life of the engine.

    Raises:
        EngineError: the engine was started without live mode.
    """
    pool: KVPool | None = getattr(core, "liveprune_kv_pool", None)
    if pool is None:
        manager = core.scheduler.kv_cache_manager
        status = kv_status(manager.kv_cache_config)
        if status is None:
            raise EngineError("KV cache: the engine was started without live variants")
        pool = KVPool(manager.block_pool, status.max_blocks, status.block_bytes, status.min_blocks)
        core.liveprune_kv_pool = pool
    return pool


def wrap_get_kv_cache_configs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give the workers addresses for more blocks than they have memory for."""

    def get_kv_cache_configs(
        vllm_config: Any, kv_cache_specs: Any, available_memory: Any
    ) -> list[Any]:
        configs: list[Any] = original(vllm_config, kv_cache_specs, available_memory)
        live = live_config(vllm_config)
        # HiSparse keeps blocks on the host too, in a pool of its own.
        hisparse = vllm_config.attention_config.hisparse_config is not None
        if live is None or hisparse or not configs[0].kv_cache_tensors:
            return configs
        status = _plan(vllm_config, configs, live.kv_extra_bytes)
        for config in configs:
            _extend(vllm_config, config, status.max_blocks)
            setattr(config, _STATUS, status)
        return configs

    return get_kv_cache_configs


def wrap_scheduler_kv_cache_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let the scheduler start with the blocks that vLLM found memory for."""

    def generate_scheduler_kv_cache_config(kv_cache_configs: list[Any]) -> Any:
        config = original(kv_cache_configs)
        status = kv_status(config)
        if status is not None:
            config.num_blocks = status.blocks
        return config

    return generate_scheduler_kv_cache_config


def wrap_initialize_from_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Report the scheduler's number of blocks: worker and engine may share a cache config."""

    def initialize_from_config(self: Any, kv_cache_config: Any) -> None:
        original(self, kv_cache_config)
        status = kv_status(kv_cache_config)
        if status is not None and not _sizes_tables_by_blocks(self.model_runner):
            self.cache_config.num_gpu_blocks = status.blocks

    return initialize_from_config


def _plan(vllm_config: Any, configs: list[Any], extra_bytes: int) -> KVStatus:
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    blocks = configs[0].num_blocks
    block_bytes = sum(config.kv_cache_tensors[0].size // blocks for config in configs)
    requests = get_max_concurrency_for_kv_cache_config(vllm_config, configs[0])
    return KVStatus(
        blocks=blocks,
        # A request of the greatest length, and the null block that nothing uses.
        min_blocks=round(blocks / requests) + 1,
        max_blocks=blocks + extra_bytes // block_bytes,
        block_bytes=block_bytes,
    )


def _extend(vllm_config: Any, config: Any, blocks: int) -> None:
    """Place the layers of one worker as vLLM does for ``blocks``, whatever memory there is."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups

    cache_config = vllm_config.cache_config
    override = cache_config.num_gpu_blocks_override
    cache_config.num_gpu_blocks_override = blocks
    try:
        planned = get_kv_cache_config_from_groups(vllm_config, config.kv_cache_groups, 0)
    finally:
        cache_config.num_gpu_blocks_override = override
    config.num_blocks = planned.num_blocks
    config.kv_cache_tensors = planned.kv_cache_tensors


def _sizes_tables_by_blocks(model_runner: Any) -> bool:
    """FlexAttention maps every physical block, by the number in its worker's cache config."""
    groups = [group for groups in model_runner.attn_groups for group in groups]
    return any(group.backend.get_name() == "FLEX_ATTENTION" for group in groups)
