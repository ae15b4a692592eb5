"""From hidden states of answer positions to scores, a bounded piece of logits at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from liveprune.pruning.evaluation.engine import AnswerScores

LOGIT_BYTES = 1 << 26
"""Float32 logits of one piece: fits beside a model on any device."""

ComputeLogits = Callable[[torch.Tensor], torch.Tensor | None]


def score_answers(
    compute_logits: ComputeLogits,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: int,
    reference: torch.Tensor | None = None,
) -> AnswerScores | None:
    """Score each position's distribution by its target, and by the full model's distribution.

    Args:
        compute_logits: of vLLM's model: [n, hidden] to [n, vocabulary], or None on the ranks of a
            tensor-parallel group that do not sample.
        hidden: [positions, hidden] states that predict the targets.
        targets: int64 [positions].
        vocabulary: tokens there are.
        reference: [positions, hidden] states of the full model, or None.

    Returns:
        Scores in the order of the positions; None where there are no logits.
    """
    length = max(1, LOGIT_BYTES // (4 * vocabulary))
    columns: list[list[torch.Tensor]] = []
    for start in range(0, len(targets), length):
        part = slice(start, start + length)
        logits = compute_logits(hidden[part])
        full = None if reference is None else compute_logits(reference[part])
        # The ranks work on every piece together, whichever of them gets the logits.
        if logits is not None:
            columns.append(_columns(logits.float(), targets[part], full))
    if not columns:
        return None
    predicted, *values = (torch.cat(column).cpu().numpy() for column in zip(*columns, strict=True))
    return AnswerScores(predicted, *(column.astype(np.float64) for column in values))


def _columns(
    logits: torch.Tensor, targets: torch.Tensor, full: torch.Tensor | None
) -> list[torch.Tensor]:
    """Columns of ``AnswerScores``; the predicted token is the first of equal greatest logits."""
    predicted = logits.argmax(dim=-1)
    if full is None:
        picked = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
        return [predicted, picked - logits.logsumexp(dim=-1)]
    logs, full_logs = logits.log_softmax(dim=-1), full.float().log_softmax(dim=-1)
    full_share = full_logs.exp()
    overlap = torch.minimum(logs.exp(), full_share).sum(dim=-1)
    divergence = (full_share * (full_logs - logs)).sum(dim=-1)
    return [predicted, logs.gather(1, targets.unsqueeze(1)).squeeze(1), overlap, divergence]
