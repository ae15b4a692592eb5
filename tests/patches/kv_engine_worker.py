"""The subprocess of ``test_kv_engine``: one engine whose KV cache grows and shrinks under load."""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS = 40
POISON = 127


def main(question: str, answer: str) -> None:
    asked = json.loads(Path(question).read_text())
    _patch()
    Path(answer).write_text(json.dumps(Engine(asked["model"], asked["prompts"]).story()))


def _patch() -> None:
    """Only what the KV cache needs of live mode."""
    from liveprune.patches import kv_growth, kv_memory, plugin

    seams = (
        kv_growth.GET_CONFIGS,
        kv_growth.SCHEDULER_CONFIG,
        kv_growth.INITIALIZE,
        kv_memory.ALLOCATE,
    )
    for patch in plugin.PATCHES:
        if patch.seam in seams:
            plugin._apply(patch)


class Engine:
    def __init__(self, model: str, prompts: list[list[int]]) -> None:
        from vllm import LLM

        from liveprune.patches.kv_growth import kv_pool_of
        from liveprune.patches.live_config import LiveConfig

        self.prompts = prompts
        self.sizes: list[int] = []
        """Blocks in service after each step of the run with changes."""
        llm = LLM(
            model,
            enforce_eager=True,
            max_model_len=256,
            block_size=32,
            num_gpu_blocks_override=24,
            gpu_memory_utilization=0.2,
            dtype="float32",
            skip_tokenizer_init=True,
            disable_log_stats=True,
            seed=0,
            additional_config=LiveConfig(model, 2, 0, 200 * 24576).to_additional_config(),
        )
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.runner = self.engine.model_executor.driver_worker.worker.model_runner
        self.pool = kv_pool_of(self.core)
        self.memory = self.runner.kv_cache_config.liveprune_memory

    def story(self) -> dict[str, Any]:
        scheduler = self.core.scheduler
        block_pool = scheduler.kv_cache_manager.block_pool
        told: dict[str, Any] = {
            "status": self.pool.status(),
            "num_gpu_blocks": self.core.vllm_config.cache_config.num_gpu_blocks,
            "scheduler_blocks": scheduler.kv_cache_config.num_blocks,
            "worker_blocks": self.runner.kv_cache_config.num_blocks,
        }
        told["resident_at_start"] = self.resident()
        told["never_changed"], _ = self.run()
        told["resident_after_use"] = self.resident()
        block_pool.reset_prefix_cache()

        self.resize(self.pool.max_blocks)
        told["resident_grown"] = self.resident()
        told["large"], _ = self.run()
        told["resident_large"] = self.resident()
        told["warm"], told["cached_warm"] = self.run()

        # Fewer than the prompts' prefixes take: some must be computed again.
        resident, ids = self.resident_pages(), self.pool.shrink(30)
        told["expected_shrunk"] = len(resident - self.pages_of(ids)) * mmap.PAGESIZE
        told["released"] = self.release(ids)
        told["resident_shrunk"] = self.resident()
        told["usage_shrunk"] = block_pool.get_usage()
        self.poison(ids)
        told["after_shrinking"], told["cached_shrunk"] = self.run()

        block_pool.reset_prefix_cache()
        told["changing"], _ = self.run(self._change)
        told["sizes"] = self.sizes
        return told

    def _change(self, step: int) -> None:
        if step == 3:
            self.resize(60)
        elif step == 8:
            self.resize(150)
        elif 15 <= step < 30:
            self.resize(12)  # blocks in use go as they become free
        elif step == 30:
            self.resize(100)
        elif step > 40:
            self.resize(self.pool.min_blocks)
        self.sizes.append(self.pool.blocks)

    def run(
        self, after_step: Callable[[int], None] = lambda step: None
    ) -> tuple[list[list[int]], list[int]]:
        """Greedy tokens of all prompts, and how many prompt tokens came from the prefix cache."""
        from vllm import SamplingParams

        plain = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
        for i, prompt in enumerate(self.prompts):
            self.engine.add_request(f"{i}", {"prompt_token_ids": prompt}, plain)
        tokens, cached, step = {}, {}, 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
                    cached[output.request_id] = output.num_cached_tokens or 0
            after_step(step)
            step += 1
        names = [f"{i}" for i in range(len(self.prompts))]
        return [tokens[name] for name in names], [cached[name] for name in names]

    def resize(self, blocks: int) -> None:
        from liveprune.patches.kv_memory import commit_blocks

        if blocks > self.pool.blocks:
            commit_blocks(self.runner, self.pool.next_blocks(blocks))
            self.pool.grow(blocks)
        else:
            ids = self.pool.shrink(blocks)
            self.release(ids)
            self.poison(ids)

    def release(self, ids: list[int]) -> int:
        from liveprune.patches.kv_memory import release_blocks

        return release_blocks(self.runner, ids)

    def poison(self, ids: list[int]) -> None:
        """Whoever reads a block that is out of service gets wrong tokens."""
        for cache in self.runner.kv_caches:
            cache[ids] = POISON

    def pages_of(self, ids: list[int]) -> set[int]:
        """Pages of the blocks; here each block has whole pages in every layer."""
        start = self.memory.tensor.data_ptr()
        pages = set()
        for cache in self.runner.kv_caches:
            for block in ids:
                first = (cache[block].data_ptr() - start) // mmap.PAGESIZE
                size = cache[block].numel() * cache.element_size()
                pages |= set(range(first, first + size // mmap.PAGESIZE))
        return pages

    def resident(self) -> int:
        return len(self.resident_pages()) * mmap.PAGESIZE

    def resident_pages(self) -> set[int]:
        """What the system says."""
        libc = ctypes.CDLL(None)
        libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
        size = self.memory.tensor.numel()
        found = ctypes.create_string_buffer(size // mmap.PAGESIZE)
        assert libc.mincore(self.memory.tensor.data_ptr(), size, found) == 0
        return {page for page, state in enumerate(found.raw) if state & 1}


if __name__ == "__main__":
    main(*sys.argv[1:])
