"""The choices of a chat completion as the client got them, whole or streamed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from liveprune.server.answer_copy import events
from liveprune.server.experiments.quality import Answer, ToolCall


@dataclass
class _Call:
    name: str = ""
    arguments: str = ""


@dataclass
class _Choice:
    """A choice while its parts are put together; a whole answer has one part."""

    text: str = ""
    finish: str | None = None
    calls: dict[int, _Call] = field(default_factory=dict)

    def add(self, part: Any, finish: str | None) -> None:
        self.text += part.get("content") or ""
        self.finish = finish or self.finish
        for i, said in enumerate(part.get("tool_calls") or ()):
            call = self.calls.setdefault(said.get("index", i), _Call())
            function = said.get("function") or {}
            call.name += function.get("name") or ""
            call.arguments += function.get("arguments") or ""


def chat_answers(answer: bytes, *, streamed: bool) -> list[Answer] | None:
    """The choices by index, without token ids; None for what is no chat completion.

    ``streamed``: the answer is a stream of events.
    """
    found: dict[int, _Choice] = {}
    try:
        for event in events(answer) if streamed else [json.loads(answer)]:
            for choice in event["choices"]:
                part = choice["delta"] if streamed else choice["message"]
                found.setdefault(choice["index"], _Choice()).add(part, choice.get("finish_reason"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # not of that form
    return [_answer(found[index]) for index in sorted(found)]


def _answer(choice: _Choice) -> Answer:
    calls = [ToolCall(x.name, x.arguments) for _, x in sorted(choice.calls.items())]
    return Answer((), choice.text, choice.finish, calls)
