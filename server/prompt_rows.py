"""From a request and its answer, as they pass over HTTP, to a row of prompts that can be kept."""

from __future__ import annotations

import json
from typing import Any

from liveprune.server.answer_copy import events

Row = dict[str, Any]
"""``{"prompt": str, "answer": str}`` or ``{"messages": [...], "answer": str}``; both are rows that
measures without labels read (``pruning.evaluation.rows``)."""

PATHS = ("/v1/completions", "/v1/chat/completions")


def row_of(request: bytes, answer: bytes, *, streamed: bool) -> Row | None:
    """The row, or None for what is no single text and one answer to it.

    Args:
        request: body of a request to one of ``PATHS``.
        answer: body of a successful answer.
        streamed: the answer is a stream of events.
    """
    try:
        asked = json.loads(request)
        question = _question(asked)
        text = _streamed_text(answer) if streamed else _text(json.loads(answer))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None  # not of the form that a row is made from
    if question is None or not text:
        return None
    return {**question, "answer": text}


def _question(asked: Any) -> Row | None:
    if asked.get("n", 1) not in (None, 1) or asked.get("tools") or asked.get("echo"):
        return None
    if "messages" not in asked:
        prompt = asked["prompt"]
        if isinstance(prompt, list) and len(prompt) == 1:
            (prompt,) = prompt
        return {"prompt": prompt} if isinstance(prompt, str) and prompt else None
    messages = [{"role": x["role"], "content": _content(x["content"])} for x in asked["messages"]]
    texts = all(isinstance(x, str) for message in messages for x in message.values())
    if not messages or not texts or messages[-1]["role"] == "assistant":
        return None
    return {"messages": messages}


def _content(content: Any) -> str | None:
    """A message's text; None where parts of it are pictures or the like."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    if any(part["type"] != "text" for part in content):
        return None
    return "\n".join(part["text"] for part in content)


def _text(answer: Any) -> str:
    """Of a whole answer, or of one event of a stream."""
    (choice,) = answer["choices"]
    said = choice.get("message", choice.get("delta"))
    text = choice.get("text") if said is None else said.get("content")
    return text or ""


def _streamed_text(answer: bytes) -> str:
    """Of all events; ValueError for a stream that was cut off."""
    return "".join(_text(event) for event in events(answer) if event["choices"])
