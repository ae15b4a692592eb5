"""On vLLM's own planning, for the config of a tiny model."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

from liveprune.patches.kv_growth import (
    kv_pool_of,
    kv_status,
    wrap_get_kv_cache_configs,
    wrap_initialize_from_config,
    wrap_scheduler_kv_cache_config,
)
from liveprune.patches.live_config import LiveConfig
from liveprune.patches.live_types import KVStatus
from liveprune.pruning.errors import EngineError

# As vLLM wrote them, even if another test has loaded the plugin.
get_kv_cache_configs = inspect.unwrap(kv_cache_utils.get_kv_cache_configs)
generate_scheduler_config = inspect.unwrap(kv_cache_utils.generate_scheduler_kv_cache_config)
LAYERS = 3
BLOCK = LAYERS * 32 * 2 * 2 * 16 * 4
"""Bytes: 32 tokens, keys and values of 2 heads of 16 floats."""


@pytest.fixture
def make_config(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr("vllm.plugins.load_general_plugins", lambda: None)

    def make(live: Any = None, override: int | None = None) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        arguments = EngineArgs(
            model=str(tiny_model("mixtral")),
            skip_tokenizer_init=True,
            max_model_len=256,
            block_size=32,
            dtype="float32",
            enforce_eager=True,
            num_gpu_blocks_override=override,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = arguments.create_engine_config()
        # Set afterwards: only the planning of the cache is to see it.
        if isinstance(live, dict):
            live = asdict(LiveConfig("model", 2, 0, live.get("kv_extra_bytes", 0)))
        config.additional_config = {} if live is None else {"liveprune": live}
        config.cache_config.kv_cache_layout = "LBHNC"
        return config

    return make


def specs(ranks: int = 1) -> list[dict[str, Any]]:
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=16, dtype=torch.float32)
    return [{f"layers.{i}.attn": spec for i in range(LAYERS)} for _ in range(ranks)]


def plan(config: Any, memory: int = 100 * BLOCK, ranks: int = 1) -> list[KVCacheConfig]:
    wrapped = wrap_get_kv_cache_configs(get_kv_cache_configs)
    return wrapped(config, specs(ranks), [memory] * ranks)


def stock(config: Any, memory: int = 100 * BLOCK, ranks: int = 1) -> list[KVCacheConfig]:
    return get_kv_cache_configs(config, specs(ranks), [memory] * ranks)


@pytest.mark.parametrize("override", [None, 24])
def test_workers_have_addresses_for_more(make_config: Any, override: int | None) -> None:
    start = override or 100
    config = make_config({"kv_extra_bytes": 11 * BLOCK - 1}, override)
    (planned,) = plan(config)
    assert kv_status(planned) == KVStatus(start, 9, start + 10, BLOCK)
    (expected,) = stock(make_config(override=start + 10))
    assert planned == expected  # all fields: strides, offsets and sizes among them
    assert config.cache_config.num_gpu_blocks_override == override


def test_bytes_are_those_of_all_ranks(make_config: Any) -> None:
    planned = plan(make_config({"kv_extra_bytes": 10 * BLOCK}), ranks=2)
    assert [kv_status(x) for x in planned] == [KVStatus(100, 9, 105, 2 * BLOCK)] * 2
    assert planned == stock(make_config(override=105), ranks=2)


def test_without_extra_bytes_the_plan_is_vllms(make_config: Any) -> None:
    planned = plan(make_config({}))
    assert planned == stock(make_config())
    assert kv_status(planned[0]) == KVStatus(100, 9, 100, BLOCK)


@pytest.mark.parametrize("live", [None, False])
def test_without_live_mode_nothing_changes(make_config: Any, live: Any) -> None:
    planned = plan(make_config(live))
    assert planned == stock(make_config())
    assert kv_status(planned[0]) is None


def test_hisparse_is_left_alone(make_config: Any) -> None:
    config = make_config({"kv_extra_bytes": 10 * BLOCK})
    config.attention_config.hisparse_config = object()
    wrapped = wrap_get_kv_cache_configs(lambda *_: stock(make_config()))
    assert kv_status(wrapped(config, specs(), [0])[0]) is None


def test_an_attention_free_model_is_left_alone(make_config: Any) -> None:
    config = make_config({"kv_extra_bytes": 10 * BLOCK})
    wrapped = wrap_get_kv_cache_configs(get_kv_cache_configs)
    (planned,) = wrapped(config, [{}], [0])
    assert (planned.num_blocks, kv_status(planned)) == (1, None)


def test_the_override_survives_a_failure(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config({"kv_extra_bytes": 10 * BLOCK})
    planned = stock(config)

    def fail(*_: Any) -> None:
        raise ValueError("no such layout")

    monkeypatch.setattr(kv_cache_utils, "get_kv_cache_config_from_groups", fail)
    with pytest.raises(ValueError, match="no such layout"):
        wrap_get_kv_cache_configs(lambda *_: planned)(config, specs(), [0])
    assert config.cache_config.num_gpu_blocks_override is None


def test_the_scheduler_starts_with_vllms_number(make_config: Any) -> None:
    wrapped = wrap_scheduler_kv_cache_config(generate_scheduler_config)
    planned = plan(make_config({"kv_extra_bytes": 10 * BLOCK}))
    scheduler = wrapped(planned)
    assert (scheduler.num_blocks, planned[0].num_blocks) == (100, 110)
    assert kv_status(scheduler) == kv_status(planned[0])
    plain = stock(make_config())
    assert wrapped(plain) == generate_scheduler_config(plain)


def test_the_status_travels_to_workers(make_config: Any) -> None:
    (planned,) = plan(make_config({"kv_extra_bytes": 10 * BLOCK}))
    expected = KVStatus(100, 9, 110, BLOCK)
    assert kv_status(pickle.loads(pickle.dumps(planned))) == expected  # noqa: S301
    assert kv_status(copy.deepcopy(planned)) == expected


@pytest.mark.parametrize(("backend", "reported"), [("FLASH_ATTN", 100), ("FLEX_ATTENTION", 110)])
def test_the_worker_reports_the_schedulers_blocks(
    make_config: Any, backend: str, reported: int
) -> None:
    config = make_config({"kv_extra_bytes": 10 * BLOCK})
    (planned,) = plan(config)
    group = SimpleNamespace(backend=SimpleNamespace(get_name=lambda: backend))
    worker = SimpleNamespace(
        cache_config=config.cache_config, model_runner=SimpleNamespace(attn_groups=[[group]])
    )

    def original(self: Any, kv_cache_config: Any) -> None:
        self.cache_config.num_gpu_blocks = kv_cache_config.num_blocks

    wrap_initialize_from_config(original)(worker, planned)
    assert config.cache_config.num_gpu_blocks == reported
    (plain,) = stock(make_config())
    wrap_initialize_from_config(original)(worker, plain)
    assert config.cache_config.num_gpu_blocks == 100


def core_of(kv_cache_config: Any) -> Any:
    pool = BlockPool(kv_cache_config.num_blocks, enable_caching=True, hash_block_size=32)
    manager = SimpleNamespace(kv_cache_config=kv_cache_config, block_pool=pool)
    return SimpleNamespace(scheduler=SimpleNamespace(kv_cache_manager=manager))


def test_one_pool_an_engine(make_config: Any) -> None:
    planned = plan(make_config({"kv_extra_bytes": 10 * BLOCK}))
    wrapped = wrap_scheduler_kv_cache_config(generate_scheduler_config)
    core = core_of(wrapped(planned))
    pool = kv_pool_of(core)
    assert pool.status() == {
        "blocks": 100,
        "min_blocks": 9,
        "max_blocks": 110,
        "block_bytes": BLOCK,
    }
    pool.shrink(50)
    assert kv_pool_of(core).blocks == 50


def test_no_pool_without_live_mode(make_config: Any) -> None:
    with pytest.raises(EngineError, match="without live variants"):
        kv_pool_of(core_of(stock(make_config())[0]))
