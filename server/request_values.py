"""From what was seen of an answered request to the values of its metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from liveprune.patches.request_meter import Generation
from liveprune.server.experiments.quality import Answer, Asked, asked_of, signals

BROKEN = ("error", None)
"""Ends of a sequence that are failures: vLLM's own word, and none at all."""
_CHECKED = ("bad_json", "bad_tool_call")
"""Signals that are judged by the answer as the client got it, where that was kept."""


@dataclass(frozen=True)
class Times:
    """Of one request, in seconds of one monotonic clock."""

    began: float
    """It came in."""
    first: float | None
    """Its first token was there for the client; None: there was none."""
    ended: float
    """The last byte of its answer was sent."""


def asked_in(body: Any) -> Asked:
    """What a parsed request (pydantic) asks for, as far as it can be checked."""
    if not getattr(body, "response_format", None) and not getattr(body, "tools", None):
        return Asked()
    return asked_of(body.model_dump(include={"response_format", "tools", "tool_choice"}))


def failed(generations: Iterable[Generation]) -> bool:
    """Whether a sequence was broken off."""
    return any(x.finish in BROKEN for x in generations)


def judged(
    generations: Sequence[Generation], asked: Asked, choices: Sequence[Answer] | None = None
) -> list[dict[str, float]]:
    """Signals of each sequence, see ``quality.signals``.

    Args:
        generations: of one request.
        asked: what it asked for.
        choices: the answers as the client got them, whose parts the server has told apart
            (reasoning, tool calls); in the order of the generations. None: were not looked at.
    """
    found = [_signals(x, asked if choices is None else Asked()) for x in generations]
    if choices is not None and len(choices) == len(generations):
        for signal, choice, generation in zip(found, choices, generations, strict=True):
            seen = signals(replace(choice, tokens=generation.tokens), asked)
            signal |= {name: seen[name] for name in _CHECKED if name in seen}
    return found


def _signals(generation: Generation, asked: Asked) -> dict[str, float]:
    found = signals(Answer(generation.tokens, generation.text or "", generation.finish), asked)
    if generation.text is None:
        return {name: value for name, value in found.items() if name in ("length", "loop")}
    return found


def values_of(
    times: Times, generations: Sequence[Generation], judgements: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Metric (``experiments.metrics``) to value of a request that was answered well.

    Of several sequences (``n``, several prompts): tokens add up, a prompt that is shared counts
    once; the queue is the longest wait; time between tokens is the mean over all gaps; signals are
    the share of the sequences that show them.
    """
    prompts = {x.request: x.prompt_tokens for x in generations}
    found = {"error": 0.0, "e2e_seconds": times.ended - times.began}
    if not generations:
        return found
    found["prompt_tokens"] = float(sum(prompts.values()))
    found["output_tokens"] = float(sum(len(x.tokens) for x in generations))
    if times.first is not None:
        found["ttft_seconds"] = times.first - times.began
    queued = [x.queue_seconds for x in generations if x.queue_seconds is not None]
    if queued:
        found["queue_seconds"] = max(queued)
    gaps = sum(len(x.tokens) - 1 for x in generations if x.tokens)
    if gaps:
        spans = (x.last - x.first for x in generations if x.first is not None and x.last)
        found["inter_token_seconds"] = sum(spans) / gaps
    for name in {name for judgement in judgements for name in judgement}:
        seen = [judgement[name] for judgement in judgements if name in judgement]
        found[name] = sum(seen) / len(seen)
    return found
