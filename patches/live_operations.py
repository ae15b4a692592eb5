"""The operations of a worker by name: what ``live_core`` sends to all ranks.

``LiveWorker.liveprune`` is a method as vLLM's own: it runs on the worker's thread, between two
steps of the model. Slots and rows are ``LiveWorker``'s business; what only passes through a worker
is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from liveprune.patches import kv_memory
from liveprune.patches.live_worker import LiveWorker
from liveprune.patches.packed_forward import PackedForward
from liveprune.patches.request_scoring import take_scores
from liveprune.pruning.errors import EngineError, LiveprunError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow


def liveprune(self: Any, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Method of vLLM's worker: carry out one operation; a refusal is an answer, no exception."""
    worker: LiveWorker | None = getattr(self, "liveprune_worker", None)
    if worker is None:
        return {"error": "live variants are off in this engine"}
    if worker.statistics is not None:
        worker.statistics.fold()  # by the tables and rows of the last batch
    try:
        return {"value": _OPERATIONS[operation](worker, **arguments)}
    except LiveprunError as error:
        return {"error": str(error)}


def _score(
    worker: LiveWorker,
    slots: list[int],
    rows: list[TokenRow],
    blocks: list[int],
    against_full: bool,
) -> list[AnswerScores | None]:
    """Score answers under staged slots, with KV blocks of their own."""
    forward = PackedForward(worker.runner, worker.batch)
    compute = worker.model.compute_logits
    try:
        return worker.candidates.score(
            forward, compute, slots, rows, blocks, against_full=against_full
        )
    finally:
        worker.batch.reset()


def _expect_scores(worker: LiveWorker, answers: dict[str, list[int]]) -> None:
    worker.scores.expect(answers)


def _take_scores(
    worker: LiveWorker, keys: list[str], targets: list[int], reference: list[str] | None
) -> dict[str, Any] | None:
    vocabulary = int(worker.spec.config["vocab_size"])
    compute = worker.model.compute_logits
    return take_scores(worker.scores, compute, vocabulary, keys, targets, reference)


def _forget_scores(worker: LiveWorker) -> None:
    worker.scores.forget()


def _commit_blocks(worker: LiveWorker, ids: list[int]) -> None:
    """Give KV blocks memory, before the scheduler may use them."""
    kv_memory.commit_blocks(worker.runner, ids)


def _release_blocks(worker: LiveWorker, ids: list[int]) -> int:
    """Take the memory of KV blocks that the scheduler no longer uses."""
    return kv_memory.release_blocks(worker.runner, ids)


def _statistics(worker: LiveWorker) -> dict[str, Any]:
    """Everything counted since the start; every rank answers the same."""
    if worker.statistics is None:
        raise EngineError("live statistics are off in this engine (--live-statistics)")
    scales = {index: layer.moe.routed_scaling_factor for index, layer in worker.layers.items()}
    return {"gate_scales": scales, "variants": worker.statistics.read(worker.columns())}


_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "prepare": LiveWorker.prepare,
    "progress": LiveWorker.progress,
    "cancel": LiveWorker.cancel,
    "publish": LiveWorker.publish,
    "unpublish": LiveWorker.unpublish,
    "retire": LiveWorker.retire,
    "release": LiveWorker.release,
    "memory": LiveWorker.memory,
    "checksums": LiveWorker.checksums,
    "statistics": _statistics,
    "stage": LiveWorker.stage,
    "unstage": LiveWorker.unstage,
    "score": _score,
    "expect_scores": _expect_scores,
    "take_scores": _take_scores,
    "forget_scores": _forget_scores,
    "commit_blocks": _commit_blocks,
    "release_blocks": _release_blocks,
}
