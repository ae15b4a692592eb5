"""The running engine, seen from the API server: the server's ``LiveEngine`` protocol over vLLM."""

from __future__ import annotations

import asyncio
import copy
import uuid
from collections.abc import Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Protocol, TypeVar

from liveprune.patches.admission import serving
from liveprune.patches.live_config import LiveConfig
from liveprune.patches.live_counts import VariantCounts, parse_counts
from liveprune.patches.live_types import (
    EngineMemory,
    FillProgress,
    GoldenAnswer,
    KVStatus,
    Served,
)
from liveprune.patches.request_meter import Generation, Meter
from liveprune.patches.request_scoring import SCORE_KEY, read_scores
from liveprune.patches.user_traffic import CANDIDATE, UserTraffic
from liveprune.pruning.errors import EngineError, IncompatibleEnvironmentError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow

BACKGROUND = 1_000_000
"""Priority of candidates' requests: vLLM serves smaller numbers first, users' are 0."""
BACKGROUND_SHARE = 4
"""Candidates have at most one of so many places among the running requests: priority decides who
waits and who is preempted for want of memory, not who makes room in a full batch."""
REFERENCE = "full-"
"""What the keys of the full model's scoring requests begin with."""

T = TypeVar("T")


class Gate(Protocol):
    """Where requests of candidates wait for users (``server.background_gate``)."""

    def place(self) -> AbstractAsyncContextManager[None]: ...


class VLLMLiveEngine:
    """Sends operations to ``patches/live_core.py`` in the engine's process."""

    def __init__(self, client: Any, config: LiveConfig) -> None:
        """``client``: vLLM's AsyncLLM."""
        self._client = client
        self._config = config
        self._calls = count()
        self.gate: Gate | None = None
        """None lets candidates in at any time, below user priority."""

    @cached_property
    def traffic(self) -> UserTraffic:
        """What users ask of it."""
        return UserTraffic(self._client)

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

    def buckets(self, family: str) -> tuple[float, ...]:
        """Upper bounds of vLLM's histograms of one family, e.g. ``request_latency``."""
        from vllm.v1.metrics.buckets import histogram_buckets

        config = self._client.vllm_config
        return tuple(
            histogram_buckets(
                family,
                max_model_len=config.model_config.max_model_len,
                overrides=config.observability_config.custom_histogram_buckets,
            )
        )

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

    async def statistics(self) -> dict[str, VariantCounts]:
        return parse_counts(await self._call("statistics"))

    async def golden(
        self, variant: Served, prompts: Sequence[Sequence[int]], tokens: int
    ) -> list[GoldenAnswer]:
        answers = [self._answer(variant, prompt, tokens) for prompt in prompts]
        return list(await asyncio.gather(*answers))

    def check_background(self) -> None:
        policy = self._client.vllm_config.scheduler_config.policy
        if policy != "priority":
            raise IncompatibleEnvironmentError(
                f"candidates run below user traffic, which takes vLLM's priority scheduler: found "
                f"--scheduling-policy {policy}, expected priority; start the server with it"
            )

    async def keep_reference(self, full: Served, rows: Sequence[TokenRow]) -> None:
        await self._read(full, rows, [f"{REFERENCE}{i}" for i in range(len(rows))])

    async def score(
        self, variant: Served, rows: Sequence[TokenRow], *, against_full: bool
    ) -> AnswerScores:
        call = next(self._calls)
        keys = [f"{call}-{i}" for i in range(len(rows))]
        await self._read(variant, rows, keys)
        targets = [token for row in rows for token in row.answer]
        reference = [f"{REFERENCE}{i}" for i in range(len(rows))] if against_full else None
        return read_scores(
            await self._call("take_scores", keys=keys, targets=targets, reference=reference)
        )

    async def forget_scores(self) -> None:
        await self._call("forget_scores")

    async def generate(
        self,
        variant: Served,
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[tuple[int, ...]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            stop_token_ids=list(end),
            ignore_eos=True,  # what ends an answer is said by ``end`` alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return await self._gather(
            [self._in_background(variant, prompt, sampling) for prompt in prompts]
        )

    async def repeat(self, variant: Served, generation: Generation, meter: Meter) -> None:
        """Generate what a user was answered once more, on another variant, below user traffic.

        Args:
            variant: live, and kept so by the caller.
            generation: of the user's request; its prompt and sampling are taken.
            meter: notes how it goes; the caller closes it.

        Raises:
            ConflictError: users left no place for it.
            EngineError: it was not answered.
        """
        from vllm.sampling_params import RequestOutputKind

        sampling = copy.copy(generation.sampling)
        sampling.n, sampling.output_kind = 1, RequestOutputKind.FINAL_ONLY
        async with nullcontext() if self.gate is None else self.gate.place():
            await self._in_background(variant, generation.prompt, sampling, meter=meter)

    async def _read(self, variant: Served, rows: Sequence[TokenRow], keys: Sequence[str]) -> None:
        """Have the workers collect the hidden states of the rows' answers."""
        from vllm import SamplingParams

        texts = [row.text for row in rows]
        answers = {
            key: [len(text), len(row.answer)]
            for key, text, row in zip(keys, texts, rows, strict=True)
        }
        await self._call("expect_scores", answers=answers)
        # A cached answer would not be computed, so not be seen.
        sampling = SamplingParams(
            temperature=0, max_tokens=1, detokenize=False, skip_reading_prefix_cache=True
        )
        await self._gather(
            [
                self._in_background(variant, text, sampling, extra={SCORE_KEY: key})
                for text, key in zip(texts, keys, strict=True)
            ]
        )

    async def _gather(self, requests: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Await them, a bounded number at a time; the first failure ends the others."""
        most = self._client.vllm_config.scheduler_config.max_num_seqs // BACKGROUND_SHARE
        places = asyncio.Semaphore(max(most, 1))

        async def one(request: Coroutine[Any, Any, T]) -> T:
            async with places, nullcontext() if self.gate is None else self.gate.place():
                return await request

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(request)) for request in requests]
        except ExceptionGroup as errors:
            raise _first(errors) from None
        finally:
            for request in requests:
                request.close()  # those that never got a place
        return [task.result() for task in tasks]

    async def _in_background(
        self,
        variant: Served,
        tokens: Sequence[int],
        sampling: Any,
        *,
        extra: Mapping[str, str] | None = None,
        meter: Meter | None = None,
    ) -> tuple[int, ...]:
        """Answer one prompt below user traffic; whoever stops waiting aborts the request."""
        name = f"{CANDIDATE}{uuid.uuid4().hex}"
        if extra is not None and SCORE_KEY in extra:
            # What is written is never read again: it is only in the cache until it is evicted.
            variant = Served(variant.name, variant.slot, f"{name}:{variant.salt}")
        question = {"prompt_token_ids": list(tokens)}
        try:
            with serving(variant, extra, meter):
                stream = self._client.generate(question, sampling, name, priority=BACKGROUND)
                answers = [answer async for answer in stream]
        except Exception as error:
            # vLLM raises many types here, a dead engine among them; all mean: no answer.
            raise EngineError(f"{variant.name}: not answered: {error}") from error
        (output,) = answers[-1].outputs
        return tuple(output.token_ids)

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


def _first(errors: ExceptionGroup[Exception]) -> Exception:
    """One of what may be many of a kind."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error
