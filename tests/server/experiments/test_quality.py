from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liveprune.server.experiments.quality import (
    Answer,
    Asked,
    ToolCall,
    asked_of,
    distinct_ratio,
    signals,
)

PLAIN = Asked()
TOOLS = Asked(tools=frozenset({"search"}))
VARIED = list(range(64))


def answer(text: str = "hello", finish: str = "stop", **fields: Any) -> Answer:
    return Answer(fields.pop("tokens", VARIED), text, finish, **fields)


@given(st.lists(st.integers(0, 5), max_size=40))
def test_distinct_ratio_is_that_of_a_plain_loop(tokens: list[int]) -> None:
    seen: list[list[int]] = []
    total = 0
    for i in range(len(tokens) - 3):
        total += 1
        if tokens[i : i + 4] not in seen:
            seen.append(tokens[i : i + 4])
    assert distinct_ratio(tokens) == (len(seen) / total if total else 1.0)


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        (VARIED, 0.0),
        ([1, 2, 3, 4, 5] * 20, 1.0),
        (list(range(40)) + [7] * 60, 1.0),
        ([7] * 31, 0.0),
        ([7] * 32, 1.0),
        (list(range(60)) + list(range(20)), 0.0),
    ],
)
def test_loops(tokens: list[int], loops: float) -> None:
    assert signals(answer(tokens=tokens), PLAIN)["loop"] == loops


def test_length_and_empty() -> None:
    assert signals(answer(), PLAIN) == {"length": 0, "empty": 0, "loop": 0}
    assert signals(answer(finish="length"), PLAIN)["length"] == 1
    assert signals(answer(" \n"), PLAIN)["empty"] == 1
    call = answer("", "tool_calls", tool_calls=[ToolCall("search", "{}")])
    assert signals(call, TOOLS)["empty"] == 0


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ('{"a": [1]}', 0.0),
        ("3", 0.0),
        ('{"a": 1', 1.0),
        ("", 1.0),
        ("NaN", 1.0),
        ("```json\n{}\n```", 1.0),
        ("[" * 100_000, 1.0),
    ],
)
def test_json_where_it_was_asked_for(text: str, bad: float) -> None:
    assert signals(answer(text), Asked(json=True))["bad_json"] == bad
    assert "bad_json" not in signals(answer(text), PLAIN)
    assert "bad_json" not in signals(answer(text, "length"), Asked(json=True))


@pytest.mark.parametrize(
    ("call", "bad"),
    [
        (ToolCall("search", '{"q": "x"}'), 0.0),
        (ToolCall("search", ""), 0.0),
        (ToolCall("search", '{"q": '), 1.0),
        (ToolCall("search", "[1]"), 1.0),
        (ToolCall("serach", "{}"), 1.0),
    ],
)
def test_tool_calls(call: ToolCall, bad: float) -> None:
    found = signals(answer("", "tool_calls", tool_calls=[ToolCall("search", "{}"), call]), TOOLS)
    assert found["bad_tool_call"] == bad
    assert "bad_tool_call" not in signals(answer(), TOOLS)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, PLAIN),
        ({"response_format": {"type": "text"}, "tools": None}, PLAIN),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, Asked(json=True)),
        ({"tools": [{"type": "function", "function": {"name": "search"}}]}, TOOLS),
        ({"tools": [{"function": {"name": "search"}}], "tool_choice": "none"}, PLAIN),
        ({"response_format": "json_object", "tools": [1, {"function": 2}]}, PLAIN),
    ],
)
def test_what_a_request_asks_for(body: dict[str, Any], expected: Asked) -> None:
    assert asked_of(body) == expected
