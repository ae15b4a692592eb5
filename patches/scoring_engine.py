"""vLLM in this process as the engine of a search: one warm model, candidates as live variants."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liveprune.patches.live_config import LiveConfig
from liveprune.patches.live_types import EXTRA_ARG
from liveprune.pruning.errors import EngineError, LiveprunError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.plan import Plan

MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"


class ScoringEngine:
    """The protocol ``pruning.evaluation.engine.Engine`` over a vLLM engine of its own."""

    def __init__(
        self,
        model: Path,
        *,
        candidates: int = 16,
        spare_rows: int = 0,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        """Load the model, whole.

        Args:
            model: Checkpoint folder.
            candidates: Plans that are live at once, at most.
            spare_rows: Merged experts, and router-map rows, that a layer can hold at once.
            max_length: Tokens of the longest text; None: the model's.
            options: Further arguments of ``vllm.LLM``, e.g. ``dtype``, ``tensor_parallel_size``.

        Raises:
            EngineError: vLLM did not start.
            LiveprunError: live variants cannot work with this model or these options.
        """
        config = LiveConfig(
            checkpoint=str(model),
            slots=candidates + 1,
            spare_rows=spare_rows,
            kv_extra_bytes=0,
            required=True,
        )
        settings = {
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": 0,
            "max_model_len": max_length,
            **options,
        }
        with _in_process():
            from vllm import LLM

            try:
                self._llm = LLM(
                    str(model), additional_config=config.to_additional_config(), **settings
                )
            except LiveprunError:
                raise
            except Exception as error:
                # vLLM raises many types here; all mean: there is no engine.
                raise EngineError(f"{model}: vLLM did not start: {error}") from error
        self._core = self._llm.llm_engine.engine_core.engine_core

    def score(
        self,
        plans: Sequence[Plan | None],
        rows: Sequence[TokenRow],
        *,
        against_full: bool = False,
    ) -> list[AnswerScores]:
        found: list[AnswerScores] = []
        for slots in self._staged(plans):
            found += self._call("score", slots=slots, rows=list(rows), against_full=against_full)
        return found

    def generate(
        self,
        plans: Sequence[Plan | None],
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[list[tuple[int, ...]]]:
        found: list[list[tuple[int, ...]]] = []
        for slots in self._staged(plans):
            answers = self._generate(slots, prompts, max_tokens, end)
            found += [
                answers[start : start + len(prompts)]
                for start in range(0, len(answers), len(prompts))
            ]
        return found

    def close(self) -> None:
        """Stop vLLM; the engine cannot be used afterwards."""
        self._llm.llm_engine.engine_core.shutdown()

    def _generate(
        self,
        slots: Sequence[int],
        prompts: Sequence[tuple[int, ...]],
        max_tokens: int,
        end: Collection[int],
    ) -> list[tuple[int, ...]]:
        from vllm import SamplingParams

        def sampling(slot: int) -> Any:
            return SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                stop_token_ids=list(end),
                ignore_eos=True,  # what ends an answer is said by ``end`` alone
                detokenize=False,
                extra_args={EXTRA_ARG: {"slot": slot, "salt": None}},
            )

        questions = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        params = [sampling(slot) for slot in slots for _ in prompts]
        try:
            outputs = self._llm.generate(questions * len(slots), params, use_tqdm=False)
        except Exception as error:
            # vLLM raises many types here; all mean: no answers. Requests that are left would be
            # answered with the next ones.
            engine = self._llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise EngineError(f"generating failed: {error}") from error
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    def _staged(self, plans: Sequence[Plan | None]) -> Iterator[list[int]]:
        """Slots of the plans, as many at a time as fit; live until the next."""
        waiting = list(plans)
        try:
            while waiting:
                slots: list[int] = self._call("stage", plans=waiting)
                yield slots
                del waiting[: len(slots)]
        finally:
            self._call("unstage")

    def _call(self, operation: str, **arguments: Any) -> Any:
        try:
            reply = self._core.liveprune(operation, arguments)
        except Exception as error:
            # Kernels and executors raise what they like; all mean: not done.
            raise EngineError(f"{operation}: the engine failed: {error}") from error
        if "error" in reply:
            raise EngineError(reply["error"])
        return reply["value"]


@contextmanager
def _in_process() -> Iterator[None]:
    """Have vLLM start its engine in this process: plans and scores need not be serialised."""
    before = os.environ.get(MULTIPROCESSING)
    os.environ[MULTIPROCESSING] = "0"
    try:
        with warnings.catch_warnings():
            # vLLM's own use of what torch will change some day.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if before is None:
            del os.environ[MULTIPROCESSING]
        else:
            os.environ[MULTIPROCESSING] = before
