"""The KV cache of a real engine grows and shrinks while requests run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engine import PLUGINS, run_script

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("kv_engine_worker.py")
BLOCK = 24576
"""Bytes: 3 layers, 32 tokens, one head of 32 floats for keys and one for values."""


@pytest.fixture(scope="module")
def told(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = tiny_model("mixtral", num_attention_heads=2, num_key_value_heads=1)
    numbers = random.Random(0)
    prompts = [
        [numbers.randrange(4, 100) for _ in range(length)]
        for length in (70, 200, 130, 40, 150, 90, 180, 64, 110, 33)
    ]
    return run_script(
        SCRIPT,
        {"model": str(model), "prompts": prompts},
        tmp_path_factory.mktemp("kv"),
        environment={PLUGINS: ""},
    )


def test_the_scheduler_starts_with_fewer_blocks_than_the_workers_address(told: Any) -> None:
    assert told["status"] == {
        "blocks": 24,
        "min_blocks": 9,
        "max_blocks": 224,
        "block_bytes": BLOCK,
    }
    assert told["num_gpu_blocks"] == told["scheduler_blocks"] == 24
    assert told["worker_blocks"] == 224


def test_tokens_are_those_of_a_cache_that_never_changed(told: Any) -> None:
    assert {60, 150, 100, 9} <= set(told["sizes"])
    assert set(told["sizes"]) - {30, 60, 150, 12, 100, 9}  # shrinking waited for blocks in use
    assert told["changing"] == told["never_changed"]
    assert told["large"] == told["never_changed"]


def test_no_stale_block_is_served(told: Any) -> None:
    assert told["warm"] == told["after_shrinking"] == told["never_changed"]
    assert all(told["cached_warm"])
    assert 0 < sum(told["cached_shrunk"]) < sum(told["cached_warm"])


def test_memory_comes_with_use_and_goes_with_release(told: Any) -> None:
    assert told["resident_at_start"] == 0
    assert 0 < told["resident_after_use"] <= 24 * BLOCK
    assert told["resident_grown"] == told["resident_after_use"]
    assert told["resident_large"] > told["resident_grown"]
    assert told["released"] == (224 - 30) * BLOCK
    assert told["resident_shrunk"] == told["expected_shrunk"] <= 30 * BLOCK
    assert told["usage_shrunk"] == 0
