"""Answers scored by requests that go through vLLM's scheduler, beside those of users.

A scoring request is a text without its last token. The hidden states of its last positions, which
predict the answer, are noted as the model computes them: whole, in chunks, or again after a
preemption. What a position predicts does not depend on any of that, so it is noted by position.

V1 and Model Runner V2 both show the hidden states of every scheduled token to the code that makes
prompt log-probabilities. While nothing is expected, that code alone runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from liveprune.patches.answer_scoring import ComputeLogits, score_answers
from liveprune.patches.compat import Seam
from liveprune.patches.live_types import EXTRA_ARG
from liveprune.pruning.errors import EngineError
from liveprune.pruning.evaluation.engine import AnswerScores

PROMPT_LOGPROBS = Seam(
    "vllm.v1.worker.gpu_model_runner",
    "GPUModelRunner._get_prompt_logprobs_dict",
    ("self", "hidden_states", "num_scheduled_tokens"),
)
V2_ADD_REQUEST = Seam(
    "vllm.v1.worker.gpu.sample.prompt_logprob",
    "PromptLogprobsWorker.add_request",
    ("self", "req_id", "req_idx", "sampling_params"),
)
V2_PROMPT_LOGPROBS = Seam(
    "vllm.v1.worker.gpu.sample.prompt_logprob",
    "PromptLogprobsWorker.compute_prompt_logprobs",
    (
        "self",
        "logits_fn",
        "hidden_states",
        "input_batch",
        "all_token_ids",
        "num_computed_tokens",
        "prompt_lens",
    ),
)

STATE_BYTES = 1 << 28
"""Hidden states that are held at once, at most: beside a model and its KV cache."""
SCORE_KEY = "score"
"""Beside slot and salt in a scoring request's extra arguments: under which key it is expected."""


@dataclass(eq=False)
class _Answer:
    """What is known of one text's answer."""

    first: int
    """Position of the text that predicts the first token of the answer."""
    length: int
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    """[tokens, hidden] by the position of the first, as they came."""


class RequestScores:
    """Collects hidden states by key; belongs to one worker, and runs on its thread."""

    def __init__(self, state_bytes: int) -> None:
        """``state_bytes``: of one token's hidden state."""
        self._state_bytes = state_bytes
        self._answers: dict[str, _Answer] = {}
        self.key_of_request: dict[str, str] = {}
        """V2 only, which keeps no sampling parameters."""

    @property
    def waiting(self) -> bool:
        """Some answer is expected."""
        return bool(self._answers)

    def expect(self, answers: Mapping[str, Sequence[int]]) -> None:
        """Collect the hidden states of these requests from now on.

        Args:
            answers: by key, the tokens of the request, and how many of the last of them count.

        Raises:
            EngineError: they would take more than ``STATE_BYTES`` with those that are there.
        """
        held = sum(answer.length for answer in self._answers.values())
        size = (held + sum(length for _, length in answers.values())) * self._state_bytes
        if size > STATE_BYTES:
            raise EngineError(
                f"scoring: found {size:,} bytes of hidden states, expected at most "
                f"{STATE_BYTES:,}; score fewer rows at once"
            )
        for key, (tokens, length) in answers.items():
            self._answers[key] = _Answer(tokens - length, length)

    def collect(self, key: str, start: int, hidden: torch.Tensor) -> None:
        """Note what counts of consecutive hidden states.

        Args:
            key: of the request; one that nobody expects (any more) is left alone.
            start: position of the first.
            hidden: [tokens, hidden]; copied, since runners use the memory again.
        """
        answer = self._answers.get(key)
        if answer is None:
            return
        first = max(start, answer.first)
        end = min(start + len(hidden), answer.first + answer.length)
        if first < end:
            answer.states[first] = hidden[first - start : end - start].clone()

    def states(self, keys: Sequence[str]) -> torch.Tensor:
        """[positions, hidden] of these answers, one after another.

        Raises:
            EngineError: some were never computed, e.g. because they were read from a cache.
        """
        return torch.cat([part for key in keys for part in self._whole(key)])

    def forget(self, keys: Sequence[str] | None = None) -> None:
        """Let go of these answers, or of all: what comes of them later is left alone."""
        for key in list(self._answers) if keys is None else keys:
            self._answers.pop(key, None)
        if not self._answers:
            self.key_of_request.clear()

    def _whole(self, key: str) -> list[torch.Tensor]:
        answer = self._answers.get(key)
        if answer is None:
            raise EngineError(f"scoring: {key!r} is not expected")
        parts, position = [], answer.first
        for start, part in sorted(answer.states.items()):
            if start > position:
                break
            # After a preemption, chunks may begin and end elsewhere than before.
            fresh = part[position - start :]
            parts.append(fresh)
            position += len(fresh)
        if position < answer.first + answer.length:
            raise EngineError(
                f"scoring: found {position - answer.first} positions of an answer computed, "
                f"expected {answer.length}"
            )
        return parts


@torch.inference_mode()
def take_scores(
    scores: RequestScores,
    compute_logits: ComputeLogits,
    vocabulary: int,
    keys: Sequence[str],
    targets: Sequence[int],
    reference: Sequence[str] | None,
) -> dict[str, Any] | None:
    """Score the answers of ``keys`` and forget them; None where this rank has no logits.

    Args:
        scores: of the worker.
        compute_logits: of its model.
        vocabulary: tokens there are.
        keys: of requests that have ended.
        targets: the answers' tokens, one answer after another.
        reference: keys of the full model's requests for the same texts, which are kept.

    Returns:
        Fields of ``AnswerScores`` as lists: they cross process boundaries.
    """
    hidden = scores.states(keys)
    found = score_answers(
        compute_logits,
        hidden,
        torch.tensor(targets, dtype=torch.int64, device=hidden.device),
        vocabulary,
        None if reference is None else scores.states(reference),
    )
    scores.forget(keys)
    if found is None:
        return None
    return {name: None if x is None else x.tolist() for name, x in vars(found).items()}


def read_scores(fields: Mapping[str, Any]) -> AnswerScores:
    """The other end of ``take_scores``."""
    return AnswerScores(
        np.array(fields["predicted"], np.int64),
        np.array(fields["logprobs"], np.float64),
        *(
            None if fields[name] is None else np.array(fields[name], np.float64)
            for name in ("overlap", "divergence")
        ),
    )


def attach(runner: Any, scores: RequestScores) -> None:
    """Show ``scores`` what a runner of either generation computes."""
    runner.liveprune_scores = scores
    worker = getattr(runner, "prompt_logprobs_worker", None)
    if worker is not None:
        worker.liveprune_scores = scores


def wrap_prompt_logprobs(original: Callable[..., Any]) -> Callable[..., Any]:
    """V1: the runner knows the requests, and where each one's tokens begin in the batch."""

    def _get_prompt_logprobs_dict(
        self: Any, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> Any:
        scores: RequestScores | None = getattr(self, "liveprune_scores", None)
        if scores is not None and scores.waiting:
            for request_id, tokens in num_scheduled_tokens.items():
                request = self.requests[request_id]
                key = _carried_key(request.sampling_params)
                if key is not None:
                    index = self.input_batch.req_id_to_index[request_id]
                    begin = int(self.query_start_loc.np[index])
                    hidden = hidden_states[begin : begin + tokens]
                    scores.collect(key, request.num_computed_tokens, hidden)
        return original(self, hidden_states, num_scheduled_tokens)

    return _get_prompt_logprobs_dict


def wrap_v2_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """V2: sampling parameters are shown once, when a request comes or comes back."""

    def add_request(self: Any, req_id: str, req_idx: int, sampling_params: Any) -> None:
        original(self, req_id, req_idx, sampling_params)
        scores: RequestScores | None = getattr(self, "liveprune_scores", None)
        if scores is not None and scores.waiting:
            key = _carried_key(sampling_params)
            if key is not None:
                scores.key_of_request[req_id] = key

    return add_request


def wrap_v2_prompt_logprobs(original: Callable[..., Any]) -> Callable[..., Any]:
    """V2: the batch says where each request's tokens begin, and how many it had before."""

    def compute_prompt_logprobs(
        self: Any, logits_fn: Any, hidden_states: torch.Tensor, input_batch: Any, *rest: Any
    ) -> Any:
        scores: RequestScores | None = getattr(self, "liveprune_scores", None)
        if scores is not None and scores.waiting:
            starts = input_batch.query_start_loc_np
            for i, request_id in enumerate(input_batch.req_ids):
                key = scores.key_of_request.get(request_id)
                if key is not None:
                    # That of a text that is complete is its length: past every answer.
                    before = int(input_batch.num_computed_prefill_tokens_np[i])
                    scores.collect(key, before, hidden_states[starts[i] : starts[i + 1]])
        return original(self, logits_fn, hidden_states, input_batch, *rest)

    return compute_prompt_logprobs


def _carried_key(sampling: Any) -> str | None:
    extra = None if sampling is None else sampling.extra_args
    key: str | None = (extra or {}).get(EXTRA_ARG, {}).get(SCORE_KEY)
    return key
