"""The reference engine: transformers, one plan after another, experts rebuilt for each.

Shares nothing with the live engine: a plan is carried out on the modules of the loaded base model,
as the published searches do it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liveprune.pruning.errors import ArchitectureError, CheckpointError, EngineError, PlanError
from liveprune.pruning.evaluation.carried_out import carried_out
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_guards import check_plan

DTYPES = ("float32", "bfloat16", "float16")
FULL_BYTES = 1 << 30
"""Bound on the full model's distributions held for comparison, beyond one batch."""


class TransformersEngine:
    """An ``Engine`` on stock transformers, the base model loaded once."""

    def __init__(
        self, model: Path, *, device: str = "cpu", dtype: str = "float32", batch_rows: int = 32
    ) -> None:
        """Load ``model``; ``dtype`` is one of ``DTYPES``, ``batch_rows`` the rows per forward.

        Raises:
            CheckpointError: the checkpoint is not readable.
            ArchitectureError: the family is not supported, or its layers differ.
            EngineError: an argument is out of range.
        """
        if dtype not in DTYPES:
            raise EngineError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        if batch_rows < 1:
            raise EngineError(f"batch_rows is {batch_rows}, expected at least 1")
        self._spec = ModelSpec.from_path(model)
        if not self._spec.is_uniform:
            raise ArchitectureError(
                f"{model}: layers differ in experts or hold mappings, expected a checkpoint "
                f"that stock transformers loads"
            )
        self._model = _load(model, getattr(torch, dtype), device)
        self._device = device
        self._batch_rows = batch_rows
        self._limit = int(self._spec.config["max_position_embeddings"])

    @torch.no_grad()
    def score(
        self,
        plans: Sequence[Plan | None],
        rows: Sequence[TokenRow],
        *,
        against_full: bool = False,
    ) -> list[AnswerScores]:
        """Score answers teacher-forced, see ``Engine``; log-softmax and sums in float32."""
        self._check(plans, [len(row.prompt) + len(row.answer) for row in rows])
        results = [_Scores(rows, against_full=against_full) for _ in plans]
        for part in self._parts(rows, against_full=against_full):
            full = [self._logprobs(rows, batch) for batch in part] if against_full else None
            for plan, result in zip(plans, results, strict=True):
                with self._running(plan):
                    for i, batch in enumerate(part):
                        logprobs = self._logprobs(rows, batch)
                        result.add(batch, logprobs, full[i] if full is not None else None)
        return [result.scores() for result in results]

    @torch.no_grad()
    def generate(
        self,
        plans: Sequence[Plan | None],
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[list[tuple[int, ...]]]:
        """Decode greedily, see ``Engine``."""
        self._check(plans, [len(prompt) + max_tokens for prompt in prompts])
        results = []
        for plan in plans:
            answers: list[tuple[int, ...]] = [()] * len(prompts)
            with self._running(plan):
                for batch in self._batches([len(prompt) for prompt in prompts]):
                    chosen = [prompts[i] for i in batch]
                    for i, answer in zip(batch, self._decode(chosen, max_tokens, end), strict=True):
                        answers[i] = answer
            results.append(answers)
        return results

    def _check(self, plans: Sequence[Plan | None], lengths: Sequence[int]) -> None:
        longest = max(lengths, default=0)
        if longest > self._limit:
            raise EngineError(
                f"row {lengths.index(longest)}: found {longest} tokens with the answer, expected "
                f"at most {self._limit}"
            )
        for plan in plans:
            if plan is None:
                continue
            try:
                check_plan(plan, self._spec)
            except PlanError as error:
                raise EngineError(f"plan {plan.digest}: {error}") from error

    @contextmanager
    def _running(self, plan: Plan | None) -> Iterator[None]:
        """Carry out a plan; what fails meanwhile, lack of memory for one, is that plan's."""
        name = "the full model" if plan is None else f"plan {plan.digest}"
        try:
            with carried_out(self._model, self._spec, plan):
                yield
        except RuntimeError as error:
            raise EngineError(f"{name}: transformers failed: {error}") from error

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Row numbers in batches of like length, the longest first."""
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        return [order[i : i + self._batch_rows] for i in range(0, len(order), self._batch_rows)]

    def _parts(self, rows: Sequence[TokenRow], *, against_full: bool) -> list[list[list[int]]]:
        """Batches in parts whose full distributions may be held at once."""
        batches = self._batches([len(row.prompt) + len(row.answer) for row in rows])
        if not against_full:
            return [batches]
        parts: list[list[list[int]]] = []
        held = FULL_BYTES
        for batch in batches:
            size = 4 * self._model.config.vocab_size * sum(len(rows[i].answer) for i in batch)
            if held + size > FULL_BYTES:
                parts.append([])
                held = 0
            parts[-1].append(batch)
            held += size
        return parts

    def _logprobs(self, rows: Sequence[TokenRow], batch: Sequence[int]) -> Tensor:
        """[answer tokens of the batch, vocabulary] float32, rows one after another."""
        # The last token predicts nothing that is scored.
        sequences = [(*rows[i].prompt, *rows[i].answer)[:-1] for i in batch]
        ids, mask = self._padded(sequences, left=False)
        hidden = self._model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        answers = [
            hidden[place, len(rows[i].prompt) - 1 : len(sequences[place])]
            for place, i in enumerate(batch)
        ]
        logits: Tensor = self._model.lm_head(torch.cat(answers))
        return logits.float().log_softmax(-1)

    def _decode(
        self, prompts: Sequence[tuple[int, ...]], max_tokens: int, end: Collection[int]
    ) -> list[tuple[int, ...]]:
        from transformers import GenerationConfig

        ids, mask = self._padded(prompts, left=True)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=sorted(end) or None,
            pad_token_id=0,
        )
        output = self._model.generate(ids, attention_mask=mask, generation_config=config)
        return [_until(row, end) for row in output[:, ids.shape[1] :].tolist()]

    def _padded(self, rows: Sequence[tuple[int, ...]], *, left: bool) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, [rows, longest] int64."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            start = longest - len(row) if left else 0
            ids[place, start : start + len(row)] = torch.tensor(row)
            mask[place, start : start + len(row)] = 1
        return ids.to(self._device), mask.to(self._device)


class _Scores:
    """Gathers one plan's numbers, batch by batch, in the order of the rows."""

    def __init__(self, rows: Sequence[TokenRow], *, against_full: bool) -> None:
        lengths = [len(row.answer) for row in rows]
        self._starts = np.cumsum([0, *lengths]).tolist()
        self._answers = [row.answer for row in rows]
        tokens = sum(lengths)
        self._predicted = np.empty(tokens, np.int64)
        self._logprobs = np.empty(tokens)
        self._against = (np.empty(tokens), np.empty(tokens)) if against_full else None

    def add(self, batch: Sequence[int], logprobs: Tensor, full: Tensor | None) -> None:
        """Take [tokens, vocabulary] float32 of the plan and, to compare, of the full model."""
        where = np.concatenate([np.arange(self._starts[i], self._starts[i + 1]) for i in batch])
        answers = [token for i in batch for token in self._answers[i]]
        ids = torch.tensor(answers, device=logprobs.device)[:, None]
        self._predicted[where] = logprobs.argmax(-1).cpu().numpy()
        self._logprobs[where] = logprobs.gather(1, ids)[:, 0].cpu().numpy()
        if full is not None and self._against is not None:
            overlap, divergence = self._against
            overlap[where] = torch.minimum(logprobs, full).exp().sum(-1).cpu().numpy()
            divergence[where] = (full.exp() * (full - logprobs)).sum(-1).cpu().numpy()

    def scores(self) -> AnswerScores:
        overlap, divergence = self._against or (None, None)
        return AnswerScores(self._predicted, self._logprobs, overlap, divergence)


def _until(tokens: Sequence[int], end: Collection[int]) -> tuple[int, ...]:
    """Up to the first end token, that included; padding follows it."""
    for place, token in enumerate(tokens):
        if token in end:
            return tuple(tokens[: place + 1])
    return tuple(tokens)


def _load(model: Path, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{model}: transformers cannot load it: {error}; expected an ordinary checkpoint"
        ) from error
    # The checkpoint's own sampling defaults (a repetition penalty, say) would change the answers.
    loaded.generation_config = GenerationConfig()
    return loaded.to(device).eval()
