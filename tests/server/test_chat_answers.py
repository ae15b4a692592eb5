from __future__ import annotations

import json
from typing import Any

import pytest

from liveprune.server.chat_answers import chat_answers
from liveprune.server.experiments.quality import Answer, ToolCall


def call(name: str | None, arguments: str, **more: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}, **more}


def whole(*messages: dict[str, Any]) -> bytes:
    choices = [
        {"index": i, "message": message, "finish_reason": "stop"}
        for i, message in enumerate(messages)
    ]
    return json.dumps({"choices": choices}).encode()


def stream(*events: Any, end: str = "[DONE]") -> bytes:
    lines = [": a comment", *(f"data: {json.dumps({'choices': x})}" for x in events)]
    return "\n\n".join([*lines, f"data: {end}", ""]).encode()


def delta(index: int = 0, finish: str | None = None, **part: Any) -> dict[str, Any]:
    return {"index": index, "delta": part, "finish_reason": finish}


def test_a_whole_answer() -> None:
    calls = [call("f", "{}"), call("g", '{"x": 1}')]
    found = chat_answers(
        whole({"content": "hello"}, {"content": None, "tool_calls": calls}), streamed=False
    )
    assert found == [
        Answer((), "hello", "stop", []),
        Answer((), "", "stop", [ToolCall("f", "{}"), ToolCall("g", '{"x": 1}')]),
    ]


def test_a_streamed_answer() -> None:
    found = chat_answers(
        stream(
            [delta(role="assistant", content="")],
            [delta(1, content="other"), delta(content="hel")],
            [delta(content="lo")],
            [delta(tool_calls=[call("f", "", index=0), call("g", "{}", index=1)])],
            [delta(tool_calls=[call(None, '{"x"', index=0)])],
            [delta(finish="tool_calls", tool_calls=[call(None, ": 1}", index=0)])],
            [delta(1, "length")],
            [],
        ),
        streamed=True,
    )
    calls = [ToolCall("f", '{"x": 1}'), ToolCall("g", "{}")]
    assert found == [
        Answer((), "hello", "tool_calls", calls),
        Answer((), "other", "length", []),
    ]


@pytest.mark.parametrize(
    ("answer", "streamed"),
    [
        (b"", False),
        (b"[]", False),
        (b'{"choices": [{}]}', False),
        (b'{"choices": [{"index": 0, "message": "text"}]}', False),
        (whole({"content": "a"})[:-1], False),
        (whole({"content": "a"}), True),
        (stream([delta(content="a")], end="{}"), True),
        (b"\xff", True),
    ],
)
def test_what_is_no_chat_completion(answer: bytes, streamed: bool) -> None:
    assert chat_answers(answer, streamed=streamed) is None
