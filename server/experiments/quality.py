"""What can be seen of a finished answer's quality without a judge: pruning's failure modes.

Pruned models fail in the tails: they loop, do not end, or break the form that was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LOOP_RATIO = 0.55
"""Below this share of distinct 4-grams an answer loops."""
GRAM = 4
SHORTEST = 32
"""Tokens; shorter answers are not judged for loops: lists and tables repeat a little."""
_JSON_FORMATS = ("json_object", "json_schema")


@dataclass(frozen=True)
class Asked:
    """What a request asked for, as far as it can be checked."""

    json: bool = False
    tools: frozenset[str] = frozenset()
    """Names of the tools that may be called; empty: none were given."""


@dataclass(frozen=True)
class ToolCall:
    """A call as the answer made it."""

    name: str
    arguments: str
    """JSON text."""


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    tokens: Sequence[int]
    """Token ids, end of sequence included or not."""
    text: str
    finish_reason: str | None
    tool_calls: Sequence[ToolCall] = ()


def asked_of(body: Mapping[str, Any]) -> Asked:
    """What the parsed body of an OpenAI request asks for; what is malformed asks for nothing."""
    form = body.get("response_format")
    wanted = isinstance(form, Mapping) and form.get("type") in _JSON_FORMATS
    tools = body.get("tools")
    names = [
        tool["function"].get("name")
        for tool in (tools if isinstance(tools, list) else ())
        if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping)
    ]
    known = frozenset(name for name in names if isinstance(name, str))
    return Asked(wanted, frozenset() if body.get("tool_choice") == "none" else known)


def distinct_ratio(tokens: Sequence[int], gram: int = GRAM) -> float:
    """Distinct n-grams over all n-grams of token ids; 1 where there are none."""
    total = len(tokens) - gram + 1
    if total <= 0:
        return 1.0
    return len(set(zip(*(tokens[i:] for i in range(gram)), strict=False))) / total


def signals(answer: Answer, asked: Asked) -> dict[str, float]:
    """Metric to 0 or 1 of one finished answer.

    ``bad_json`` is there only where JSON was asked for, ``bad_tool_call`` only where tools were
    called. An answer that was cut off at its length limit is a ``length``; that its JSON is
    incomplete then is no second failure.
    """
    cut = answer.finish_reason == "length"
    empty = not answer.text.strip() and not answer.tool_calls
    looping = len(answer.tokens) >= SHORTEST and distinct_ratio(answer.tokens) < LOOP_RATIO
    found = {"length": float(cut), "empty": float(empty), "loop": float(looping)}
    if asked.json and not answer.tool_calls and not cut:
        found["bad_json"] = float(not _is_json(answer.text))
    if answer.tool_calls and not cut:
        bad = any(not _is_good(call, asked) for call in answer.tool_calls)
        found["bad_tool_call"] = float(bad)
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _is_good(call: ToolCall, asked: Asked) -> bool:
    if call.name not in asked.tools:
        return False
    try:
        return isinstance(json.loads(call.arguments or "{}", parse_constant=_refuse), dict)
    except (ValueError, RecursionError):
        return False


def _refuse(name: str) -> None:
    """Python reads NaN and Infinity; JSON has no such numbers."""
    raise ValueError(f"{name} is not JSON")
