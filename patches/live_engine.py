"""The running engine, seen from the API server: the server's ``LiveEngine`` protocol over vLLM."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liveprune.patches.admission import serving
from liveprune.patches.live_config import LiveConfig
from liveprune.patches.live_types import (
    EngineMemory,
    FillProgress,
    GoldenAnswer,
    KVStatus,
    Served,
)
from liveprune.pruning.errors import EngineError


class VLLMLiveEngine:
    """Sends operations to ``patches/live_core.py`` in the engine's process."""

    def __init__(self, client: Any, config: LiveConfig) -> None:
        """``client``: vLLM's AsyncLLM."""
        self._client = client
        self._config = config

    @property
    def slots(self) -> int:
        return self._config.slots

    @property
    def dtype(self) -> str:
        """What the engine computes in, e.g. ``bfloat16``."""
        return str(self._client.model_config.dtype).removeprefix("torch.")

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is on, which rounds otherwise."""
        from vllm.config import CompilationMode

        mode = self._client.vllm_config.compilation_config.mode
        return bool(mode != CompilationMode.NONE)

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks."""
        return int(self._client.vllm_config.parallel_config.tensor_parallel_size)

    @property
    def vocabulary(self) -> int:
        """Token ids there are."""
        return int(self._client.model_config.get_vocab_size())

    @property
    def vllm_version(self) -> str:
        """Version of vLLM."""
        from vllm import __version__

        return str(__version__)

    async def prepare(self, slot: int, plan: Path | None) -> None:
        await self._call("prepare", slot=slot, plan=None if plan is None else str(plan))

    async def progress(self, slot: int) -> FillProgress:
        return FillProgress(**await self._call("progress", slot=slot))

    async def cancel(self, slot: int) -> None:
        await self._call("cancel", slot=slot)

    async def publish(self, slot: int) -> None:
        await self._call("publish", slot=slot)

    async def retire(self, slot: int) -> bool:
        return bool(await self._call("retire", slot=slot))

    async def release(self) -> int:
        return int(await self._call("release"))

    async def memory(self) -> EngineMemory:
        fields = await self._call("memory")
        fields["slots"] = {int(slot): size for slot, size in fields["slots"].items()}
        return EngineMemory(**fields)

    async def kv(self) -> KVStatus:
        return KVStatus(**await self._call("kv"))

    async def resize_kv(self, blocks: int) -> KVStatus:
        return KVStatus(**await self._call("resize_kv", blocks=blocks))

    async def checksums(self, slot: int) -> dict[str, int]:
        """CRC-32 of every expert row that a live slot needs, by rank, layer and row."""
        return dict(await self._call("checksums", slot=slot))

    async def golden(
        self, variant: Served, prompts: Sequence[Sequence[int]], tokens: int
    ) -> list[GoldenAnswer]:
        answers = [self._answer(variant, prompt, tokens) for prompt in prompts]
        return list(await asyncio.gather(*answers))

    async def _answer(self, variant: Served, prompt: Sequence[int], tokens: int) -> GoldenAnswer:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            skip_reading_prefix_cache=True,
        )
        # Its own salt: what a canary on damaged weights leaves in the cache must never be read.
        name = f"golden-{uuid.uuid4().hex}"
        private = Served(variant.name, variant.slot, f"{name}:{variant.salt}")
        question = {"prompt_token_ids": list(prompt)}
        try:
            with serving(private):
                answers = [x async for x in self._client.generate(question, sampling, name)]
        except Exception as error:
            # vLLM raises many types here, a dead engine among them; all mean: no answer.
            raise EngineError(f"{variant.name}: canary prompt not answered: {error}") from error
        (output,) = answers[-1].outputs
        found = [
            entry[token].logprob
            for token, entry in zip(output.token_ids, output.logprobs, strict=True)
        ]
        return GoldenAnswer(list(output.token_ids), found)

    async def _call(self, operation: str, **arguments: Any) -> Any:
        try:
            reply = await self._client.engine_core.call_utility_async(
                "liveprune", operation, arguments
            )
        except Exception as error:
            # A failed utility call is a bare Exception in vLLM, a dead engine an EngineDeadError.
            raise EngineError(f"{operation}: the engine failed: {error}") from error
        if reply.get("error"):
            raise EngineError(reply["error"])
        return reply["value"]
