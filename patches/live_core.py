"""Live variants in the engine's process: who still uses a slot, the KV cache, calls to workers.

``EngineCore.liveprune`` is a utility method as vLLM's own: it runs between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from liveprune.patches.answer_states import blocks_needed
from liveprune.patches.kv_growth import kv_pool_of
from liveprune.patches.live_types import EXTRA_ARG
from liveprune.pruning.errors import EngineError, LiveprunError
from liveprune.pruning.evaluation.engine import AnswerScores

Reply = dict[str, Any]
Operation = Callable[[Any, str, dict[str, Any]], Any]
"""Of vLLM's EngineCore, the operation's name and its arguments."""


def liveprune(self: Any, operation: str, arguments: dict[str, Any]) -> Reply:
    """Carry out one operation of ``server.engine.LiveEngine``; ``self`` is vLLM's EngineCore.

    Returns:
        ``{"value": ...}``, or ``{"error": one line}`` if it was refused and nothing changed.
    """
    try:
        return {"value": _OWN.get(operation, _workers)(self, operation, arguments)}
    except LiveprunError as error:
        return {"error": str(error)}


def _workers(core: Any, operation: str, arguments: dict[str, Any]) -> Any:
    """Ask all ranks; their answers are added up."""
    replies = core.model_executor.collective_rpc("liveprune", args=(operation, arguments))
    errors = [reply["error"] for reply in replies if reply.get("error")]
    if errors:
        if operation in ("prepare", "publish") and len(errors) < len(replies):
            # Ranks must agree: what some have done, all undo.
            undo = "cancel" if operation == "prepare" else "unpublish"
            core.model_executor.collective_rpc("liveprune", args=(undo, arguments))
        raise LiveprunError(errors[0])
    return _MERGE.get(operation, _first)([reply["value"] for reply in replies])


def _retire(core: Any, operation: str, arguments: dict[str, Any]) -> bool:
    """Only when no request of the engine routes by the slot; then its tables are cleared."""
    if any(_slot_of(request) == arguments["slot"] for request in core.scheduler.requests.values()):
        return False
    _workers(core, operation, arguments)
    return True


def _slot_of(request: Any) -> int | None:
    sampling = request.sampling_params
    carried = (sampling.extra_args or {}).get(EXTRA_ARG) if sampling is not None else None
    # A request without a variant (vLLM used from Python) routes by the base's tables.
    return int(carried["slot"]) if carried else 0


def _kv(core: Any, _: str, __: dict[str, Any]) -> dict[str, int]:
    return kv_pool_of(core).status()


def _resize_kv(core: Any, _: str, arguments: dict[str, Any]) -> dict[str, int]:
    """Pages first, then blocks, where the cache grows; the other way round where it shrinks."""
    pool = kv_pool_of(core)
    wanted = max(pool.min_blocks, min(arguments["blocks"], pool.max_blocks))
    if wanted > pool.blocks:
        ids = pool.next_blocks(wanted)
        _workers(core, "commit_blocks", {"ids": ids})
        pool.grow(wanted)
    elif wanted < pool.blocks:
        _workers(core, "release_blocks", {"ids": pool.shrink(wanted)})
    return pool.status()


def _score(core: Any, operation: str, arguments: dict[str, Any]) -> list[AnswerScores | None]:
    """Lend the workers KV blocks that no request has, for the time of the call."""
    pool = core.scheduler.kv_cache_manager.block_pool
    size = core.vllm_config.cache_config.block_size
    needed = [blocks_needed(row, size) for row in arguments["rows"]]
    free, least = pool.get_num_free_blocks(), max(needed)
    if free < least:
        raise EngineError(f"scoring needs {least} KV blocks for its longest row, found {free} free")
    wanted = len(arguments["slots"]) * sum(needed)
    blocks = pool.get_new_blocks(min(free, wanted))
    try:
        ids = [block.block_id for block in blocks]
        scores: list[AnswerScores | None] = _workers(core, operation, {**arguments, "blocks": ids})
        return scores
    finally:
        pool.free_blocks(blocks)


def _first(values: Sequence[Any]) -> Any:
    return values[0]


def _least_advanced(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    order = ("failed", "cancelled", "filling", "verifying", "ready")
    slowest = min(values, key=lambda value: order.index(value["phase"]))
    return {
        "phase": slowest["phase"],
        "error": slowest["error"],
        "bytes_done": sum(value["bytes_done"] for value in values),
        "bytes_total": sum(value["bytes_total"] for value in values),
    }


def _memory(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total = {key: sum(value[key] for value in values) for key in values[0] if key != "slots"}
    slots = {slot: sum(value["slots"][slot] for value in values) for slot in values[0]["slots"]}
    return {**total, "slots": slots}


def _by_rank(values: Sequence[dict[str, int]]) -> dict[str, int]:
    return {f"{rank}/{key}": crc for rank, value in enumerate(values) for key, crc in value.items()}


_OWN: dict[str, Operation] = {
    "retire": _retire,
    "kv": _kv,
    "resize_kv": _resize_kv,
    "score": _score,
}
_MERGE: dict[str, Callable[[Sequence[Any]], Any]] = {
    "progress": _least_advanced,
    "release": sum,
    "memory": _memory,
    "checksums": _by_rank,
}
