from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from liveprune.patches.request_meter import Generation
from liveprune.server.experiments.metrics import check_value
from liveprune.server.experiments.quality import Answer, Asked, ToolCall
from liveprune.server.request_values import Times, asked_in, failed, judged, values_of

LOOP = [1, 2] * 20


def generation(*tokens: int, **changes: Any) -> Generation:
    fields: dict[str, Any] = {
        "request": "a",
        "prompt": [1, 2],
        "prompt_tokens": 2,
        "tokens": tokens,
        "text": "text",
        "finish": "stop",
        "first": 1.0,
        "last": 3.0,
        "queue_seconds": 0.5,
        "sampling": None,
        **changes,
    }
    return Generation(**fields)


def test_the_values_of_one_sequence() -> None:
    one = generation(7, 8, 9, 9, 9)
    found = values_of(Times(10.0, 10.25, 12.0), [one], judged([one], Asked()))
    assert found == {
        "error": 0.0,
        "e2e_seconds": 2.0,
        "ttft_seconds": 0.25,
        "inter_token_seconds": 0.5,
        "queue_seconds": 0.5,
        "prompt_tokens": 2.0,
        "output_tokens": 5.0,
        "length": 0.0,
        "empty": 0.0,
        "loop": 0.0,
    }
    for name, value in found.items():
        check_value(name, value)


def test_several_sequences_are_put_together() -> None:
    several = [
        generation(*LOOP, finish="length", first=1.0, last=5.0, queue_seconds=0.25),
        generation(7, text=" ", first=2.0, last=2.0, queue_seconds=None),
        generation(7, 8, request="b", prompt_tokens=9, first=2.0, last=8.0, queue_seconds=0.75),
        generation(request="b", prompt_tokens=9, first=None, last=None, queue_seconds=0.1),
    ]
    found = values_of(Times(0.0, 1.0, 9.0), several, judged(several, Asked()))
    assert (found["prompt_tokens"], found["output_tokens"]) == (2 + 9, 40 + 1 + 2)
    assert found["inter_token_seconds"] == pytest.approx((4 + 0 + 6) / (39 + 0 + 1))
    assert found["queue_seconds"] == 0.75
    assert (found["length"], found["loop"], found["empty"]) == (0.25, 0.25, 0.25)


def test_what_was_not_seen_has_no_value() -> None:
    one = generation(7, queue_seconds=None, text=None)
    found = values_of(Times(0.0, None, 2.0), [one], judged([one], Asked()))
    assert set(found) == {
        "error",
        "e2e_seconds",
        "prompt_tokens",
        "output_tokens",
        "length",
        "loop",
    }
    assert values_of(Times(1.0, None, 2.0), [], []) == {"error": 0.0, "e2e_seconds": 1.0}


@pytest.mark.parametrize(
    ("finish", "broken"),
    [("stop", False), ("length", False), ("repetition", False), ("error", True), (None, True)],
)
def test_what_is_broken_off(finish: str | None, broken: bool) -> None:
    assert failed([generation(7), generation(8, finish=finish)]) is broken
    assert not failed([])


def test_forms_are_judged_by_the_engines_text_unless_the_answer_was_read() -> None:
    asked = Asked(json=True, tools=frozenset({"f"}))
    engine = [generation(7, text="<think>hm</think>{}"), generation(7, text="{}")]
    assert [x["bad_json"] for x in judged(engine, asked)] == [1, 0]
    read = [Answer((), "{}", "stop"), Answer((), "", "tool_calls", [ToolCall("g", "{}")])]
    first, second = judged(engine, asked, read)
    assert (first["bad_json"], "bad_tool_call" in first) == (0, False)
    assert ("bad_json" in second, second["bad_tool_call"], second["empty"]) == (False, 1, 0)


def test_answers_that_do_not_match_are_not_judged() -> None:
    asked = Asked(json=True)
    (found,) = judged([generation(7, text="{")], asked, [])
    assert set(found) == {"length", "empty", "loop"}


class Format(BaseModel):
    type: str


class Function(BaseModel):
    name: str


class Tool(BaseModel):
    type: str = "function"
    function: Function


class Body(BaseModel):
    response_format: Format | None = None
    tools: list[Tool] | None = None
    tool_choice: str | None = None


def test_what_a_parsed_request_asks_for() -> None:
    tools = [Tool(function=Function(name="f"))]
    assert asked_in(Body()) == asked_in(None) == asked_in(Body(tools=[])) == Asked()
    assert asked_in(Body(response_format=Format(type="json_schema"))) == Asked(json=True)
    assert asked_in(Body(response_format=Format(type="text"))) == Asked()
    assert asked_in(Body(tools=tools)) == Asked(tools=frozenset({"f"}))
    assert asked_in(Body(tools=tools, tool_choice="none")) == Asked()
