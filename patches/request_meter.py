"""What the engine does for one request: when its tokens come, what they are, and how it ends.

A ``Meter`` hangs on an ``Admission``. ``OutputProcessor.add_request`` runs in the request's own
context and ties what it adds to the meter; each step's outputs then only set two times per
sequence. Everything else is read once, from vLLM's own state of the sequence, when it is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from liveprune.patches.compat import Seam

FINISHED = Seam(
    "vllm.v1.engine.output_processor",
    "OutputProcessor._update_stats_from_finished",
    ("self", "req_state", "finish_reason", "iteration_stats"),
)
"""Called once for each sequence that ends by itself, after stop strings were looked for."""

_SEQUENCES = "liveprune_sequences"
"""Attribute of vLLM's OutputProcessor: engine's request id to ``_Sequence``."""


@dataclass(frozen=True)
class Generation:
    """One sequence that the engine has generated."""

    request: str
    """Names the prompt: the sequences of ``n`` > 1 share it."""
    prompt: Sequence[int]
    """Token ids; empty for a prompt of embeddings."""
    prompt_tokens: int
    tokens: Sequence[int]
    """Token ids of the output, end of sequence included."""
    text: str | None
    """As detokenized, stop strings cut off; None where the engine does not detokenize."""
    finish: str | None
    """``stop``, ``length``, ``repetition`` or ``error``; None: it was broken off."""
    first: float | None
    """When its first token left the engine, in seconds of ``time.monotonic``."""
    last: float | None
    queue_seconds: float | None
    """Until it was scheduled first; None with ``--disable-log-stats``, which has no such events."""
    sampling: Any
    """vLLM's SamplingParams."""


class _Sequence:
    """A sequence while it is generated."""

    __slots__ = ("finish", "first", "last", "sampling", "state")

    def __init__(self, state: Any, sampling: Any) -> None:
        """``state``: vLLM's RequestState."""
        self.state, self.sampling = state, sampling
        self.first: float | None = None
        self.last: float | None = None
        self.finish: str | None = None

    def generation(self) -> Generation:
        state = self.state
        tokens = state.detokenizer.output_token_ids if state.detokenizer is not None else ()
        return Generation(
            request=state.external_req_id,
            prompt=state.prompt_token_ids or (),
            prompt_tokens=state.prompt_len,
            tokens=tokens,
            text=getattr(state.detokenizer, "output_text", None),
            finish=self.finish,
            first=self.first,
            last=self.last,
            queue_seconds=_queue_seconds(state.stats),
            sampling=self.sampling,
        )


class Meter:
    """Notes what the engine does for one request; ``close`` it when the request has ended."""

    __slots__ = ("_processor", "_sequences")

    def __init__(self) -> None:
        self._processor: Any = None
        self._sequences: dict[str, _Sequence] = {}

    @property
    def first(self) -> float | None:
        """When the first token of all left the engine."""
        times = [x.first for x in self._sequences.values() if x.first is not None]
        return min(times, default=None)

    def tie(self, processor: Any, request: Any) -> None:
        """Follow a sequence that has just been added to vLLM's OutputProcessor."""
        name = request.request_id
        if name in self._sequences:
            return  # more of a streamed input
        sequence = _Sequence(processor.request_states[name], request.sampling_params)
        self._processor = processor
        self._sequences[name] = sequence
        _sequences(processor)[name] = sequence

    def generations(self) -> tuple[Generation, ...]:
        """What there is by now, in the order in which it was asked of the engine."""
        return tuple(x.generation() for x in self._sequences.values())

    def close(self) -> None:
        """Follow nothing more; what was noted stays."""
        for name in self._sequences:
            _sequences(self._processor).pop(name, None)


def note_step(processor: Any, outputs: Sequence[Any]) -> None:
    """Note that tokens came: one step's outputs (vLLM's EngineCoreOutput)."""
    sequences = getattr(processor, _SEQUENCES, None)
    if not sequences:
        return
    now = time.monotonic()
    for output in outputs:
        sequence = sequences.get(output.request_id)
        if sequence is not None and output.new_token_ids:
            sequence.last = now
            if sequence.first is None:
                sequence.first = now


def wrap_finished(original: Callable[..., Any]) -> Callable[..., Any]:
    """Note how a sequence ended."""

    def _update_stats_from_finished(
        self: Any, req_state: Any, finish_reason: Any, iteration_stats: Any
    ) -> Any:
        # The engine may still send tokens after a stop string: they are nobody's.
        sequence = getattr(self, _SEQUENCES, {}).pop(req_state.request_id, None)
        if sequence is not None:
            sequence.finish = str(finish_reason)
        return original(self, req_state, finish_reason, iteration_stats)

    return _update_stats_from_finished


def response_id(scope: Mapping[str, Any]) -> str | None:
    """The ``id`` that vLLM gives an answer, from the HTTP request's ASGI scope.

    ``scope`` must have had a ``state`` before vLLM saw it. None: it was not answered.
    """
    metadata = scope.get("state", {}).get("request_metadata")
    return None if metadata is None else str(metadata.request_id)


def _sequences(processor: Any) -> dict[str, _Sequence]:
    found: dict[str, _Sequence] = processor.__dict__.setdefault(_SEQUENCES, {})
    return found


def _queue_seconds(stats: Any) -> float | None:
    if stats is None or not stats.queued_ts or not stats.scheduled_ts:
        return None
    return float(stats.scheduled_ts - stats.queued_ts)
