from __future__ import annotations

import asyncio
import json
import logging
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from liveprune.patches import admission
from liveprune.pruning.errors import DataError
from liveprune.pruning.evaluation.rows import load_questions
from liveprune.server.answer_copy import MOST_BYTES
from liveprune.server.kept_prompts import LONGEST, KeptPrompts, redactions
from liveprune.server.prompt_middleware import PromptMiddleware
from liveprune.server.prompt_rows import row_of
from liveprune.server.variant_middleware import VariantMiddleware
from tests.patches.front_end import E4, NAME, FakeDirectory

CHAT: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "what is 2+2"}]}
TEXT = {"model": NAME, "prompt": "once upon"}


def rows_in(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "prompts").iterdir())
    return [json.loads(file.read_text()) for file in files]


# ---- rows


def whole(**choice: Any) -> bytes:
    return json.dumps({"choices": [choice]}).encode()


def events(*choices: list[dict[str, Any]], done: bool = True) -> bytes:
    lines = [f"data: {json.dumps({'choices': choice})}\n\n" for choice in choices]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()


def row(request: Any, answer: bytes, *, streamed: bool = False) -> Any:
    return row_of(json.dumps(request).encode(), answer, streamed=streamed)


def test_rows_of_whole_answers() -> None:
    assert row(TEXT, whole(text=" a time")) == {"prompt": "once upon", "answer": " a time"}
    assert row({"prompt": ["one"]}, whole(text="x")) == {"prompt": "one", "answer": "x"}
    message = {"role": "assistant", "content": "4"}
    assert row(CHAT, whole(message=message)) == {"messages": CHAT["messages"], "answer": "4"}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = row({"messages": [{"role": "user", "content": parts}]}, whole(message=message))
    assert found["messages"] == [{"role": "user", "content": "a\nb"}]


def test_rows_of_streams() -> None:
    deltas = [[{"delta": {"role": "assistant"}}], [{"delta": {"content": "fo"}}]]
    found = row(CHAT, events(*deltas, [{"delta": {"content": "ur"}}], []), streamed=True)
    assert found["answer"] == "four"
    assert row(TEXT, events([{"text": "a"}], [{"text": "b"}]), streamed=True)["answer"] == "ab"
    assert row(CHAT, events(*deltas, done=False), streamed=True) is None


PICTURE = [{"type": "image_url", "image_url": {"url": "data:"}}]


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": ["one", "two"]},
        {"prompt": [1, 2, 3]},
        {"prompt": ""},
        {**TEXT, "n": 2},
        {**TEXT, "echo": True},
        {**CHAT, "tools": [{"type": "function"}]},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "and"}]},
        {"messages": [{"role": "user", "content": PICTURE}]},
        {"messages": [{"role": "user"}]},
        {},
        [],
        "text",
    ],
)
def test_what_is_no_single_text_is_no_row(request_: Any) -> None:
    assert row(request_, whole(text="x", message={"content": "x"})) is None


@pytest.mark.parametrize("answer", [b"", b"no", b"{}", whole(text=""), b'{"choices": [{}, {}]}'])
def test_what_is_no_single_answer_is_no_row(answer: bytes) -> None:
    assert row(TEXT, answer) is None
    assert row_of(b"\xff", whole(text="x"), streamed=False) is None


# ---- files


def test_only_so_many_and_only_so_long(tmp_path: Path) -> None:
    clock = [1_000_000.0]
    kept = KeptPrompts(tmp_path, share=1, most=3, days=1, now=lambda: clock[0])
    for number in range(5):
        clock[0] += 3600
        kept.keep({"prompt": str(number), "answer": "x"})
    assert [x["prompt"] for x in rows_in(tmp_path)] == ["2", "3", "4"]
    clock[0] += 86400 - 3600
    kept.tidy()
    assert [x["prompt"] for x in rows_in(tmp_path)] == ["3", "4"]
    clock[0] += 86400
    KeptPrompts(tmp_path, share=0, now=lambda: clock[0], days=1)
    assert rows_in(tmp_path) == []


def test_files_are_the_owners_and_redacted(tmp_path: Path) -> None:
    patterns = redactions([r"\d{4,}", r"(?i)secret \w+"])
    kept = KeptPrompts(tmp_path, share=1, redact=patterns)
    kept.keep({"prompt": "card 1234567 and 12", "answer": "Secret word"})
    kept.keep({"messages": [{"role": "user", "content": "pin 9999"}], "answer": "é 1"})
    found = sorted(rows_in(tmp_path), key=len)
    assert {json.dumps(x, sort_keys=True) for x in found} == {
        json.dumps(x, sort_keys=True)
        for x in (
            {"prompt": "card [redacted] and 12", "answer": "[redacted]"},
            {"messages": [{"role": "user", "content": "pin [redacted]"}], "answer": "é 1"},
        )
    }
    for file in (tmp_path / "prompts").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "prompts").stat().st_mode) == 0o700
    kept.keep({"prompt": "x" * LONGEST, "answer": "too long"})
    assert len(rows_in(tmp_path)) == 2


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(DataError, match=r"--redact: found '\(', expected a regular expression"):
        redactions(["("])


def test_exported_rows_are_read_by_measures_without_labels(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    kept = KeptPrompts(tmp_path, share=1)
    with pytest.raises(DataError, match="found none"):
        kept.export(tmp_path / "rows.jsonl")
    kept.keep({"prompt": "once", "answer": "upon"})
    kept.keep({"prompt": "a time", "answer": "there"})
    assert kept.export(tmp_path / "rows.jsonl") == 2
    assert stat.S_IMODE((tmp_path / "rows.jsonl").stat().st_mode) == 0o600
    found = load_questions(tmp_path / "rows.jsonl", tiny_model("mixtral"), form="prompt")
    assert len(found.rows) == 2


def test_a_share_is_drawn(tmp_path: Path) -> None:
    drawn = sum(KeptPrompts(tmp_path, share=0.5).draw() for _ in range(200))
    assert 50 < drawn < 150
    assert not any(KeptPrompts(tmp_path, share=0.0).draw() for _ in range(50))


# ---- requests


async def completions(request: Request) -> Response:
    asked = await request.json()
    admitted = admission.current()
    assert admitted is not None
    if admitted.admit(asked["model"]) is None:
        return JSONResponse({"error": {}}, 404)
    if asked.get("stream"):
        parts = events([{"text": "a"}], [{"text": asked.get("say", "b")}]).split(b"\n\n")
        chunks = (part + b"\n\n" for part in parts)
        return StreamingResponse(_slowly(chunks), media_type="text/event-stream")
    return Response(whole(text=asked.get("say", "ab")), media_type="application/json")


async def _slowly(chunks: Any) -> Any:
    for chunk in chunks:
        await asyncio.sleep(0)
        yield chunk


Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def ask(tmp_path: Path) -> Any:
    """Send requests to a server that keeps ``share`` of them; returns the rows kept."""

    def run(*requests: dict[str, Any], share: float = 1.0, path: str = "/v1/completions") -> Any:
        async def main() -> None:
            inner = Starlette(
                routes=[Route(x, completions, methods=["POST"]) for x in ("/v1/completions", path)]
            )
            app = VariantMiddleware(PromptMiddleware(inner))
            transport = httpx.ASGITransport(app)
            async with (
                KeptPrompts(tmp_path, share=share).running(),
                httpx.AsyncClient(transport=transport, base_url="http://s") as client,
            ):
                for request in requests:
                    await client.post(path, json=request)

        admission.install(FakeDirectory())
        try:
            asyncio.run(main())
        finally:
            admission.install(None)
        return rows_in(tmp_path)

    return run


def test_requests_to_the_alias_are_kept(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    found = ask(TEXT, {**TEXT, "stream": True})
    assert found == [{"prompt": "once upon", "answer": "ab"}] * 2
    assert "once upon" not in caplog.text


def test_others_are_not(ask: Ask) -> None:
    assert ask({**TEXT, "model": E4.name}, {**TEXT, "model": "unknown"}) == []
    assert ask(TEXT, share=0.0) == []
    assert ask(TEXT, path="/v1/other") == []
    assert ask({**TEXT, "say": "x" * (MOST_BYTES + 1)}) == []


def test_a_disk_that_is_full_fails_no_request(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("liveprune.server.kept_prompts.write_atomic", full)
    assert ask(TEXT) == []
    assert re.search("could not be kept: no space left", caplog.text)
    assert "once upon" not in caplog.text
