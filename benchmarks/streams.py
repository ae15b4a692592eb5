"""Clients of a server: a process of their own that stores lines as they come and reads them after.

``streaming`` runs them beside what is measured. Streams follow each other without a pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

NAME = "model"
"""What the servers of benchmarks call their model."""
PROMPTS = [" ".join(f"t{8 + (37 * i + 11 * j) % 1000}" for j in range(16)) for i in range(8)]
Json = dict[str, Any]


async def ask(port: int, model: str, prompt: str, tokens: int) -> list[tuple[float, bytes]]:
    """One streamed answer: every line and when it came; the last one is what went wrong."""
    body: Json = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    lines = [(time.monotonic(), b"")]
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + content)
        while line := await reader.readline():
            if len(line) > 2:
                lines.append((time.monotonic(), line))
        writer.close()
    except OSError as error:
        lines.append((time.monotonic(), b"error: " + str(error).encode()))
    return lines


def read(prompt: int, lines: Sequence[tuple[float, bytes]]) -> Json:
    found: Json = {"prompt": prompt, "asked": lines[0][0], "header": "", "models": [], "text": ""}
    found |= {
        "finish": "",
        "done": False,
        "error": "",
        "times": [],
        "ended": lines[-1][0],
        "tokens": 0,
    }
    for when, line in lines[1:]:
        name, _, value = line.decode().strip().partition(": ")
        if name.startswith("HTTP/1.1") and " 200 " not in name:
            found["error"] = name
        elif name.lower() == "x-liveprune-variant":
            found["header"] = value
        elif name == "error":
            found["error"] = value
        elif name == "data" and value == "[DONE]":
            found["done"] = True
        elif name == "data":
            chunk = json.loads(value)
            found["error"] = found["error"] or str(chunk.get("error", ""))
            found["models"] = sorted({*found["models"], chunk.get("model", "")})
            # Not words of the text: special tokens are not in it.
            found["tokens"] = (chunk.get("usage") or {}).get("completion_tokens", 0)
            for choice in chunk.get("choices", ()):
                found["text"] += choice["text"]
                found["finish"] = choice["finish_reason"] or found["finish"]
                found["times"].append(when)
    return found


def _run(port: int, streams: int, tokens: int, output: str, model: str, pause: float) -> None:
    """Ask until standard input ends."""
    records: list[tuple[int, list[tuple[float, bytes]]]] = []
    stop = threading.Event()

    async def client(number: int) -> None:
        while not stop.is_set():
            prompt = number % len(PROMPTS)
            lines = await ask(port, model, PROMPTS[prompt], tokens)
            records.append((prompt, lines))
            number += 1
            await asyncio.sleep(0.1 if b"error" in lines[-1][1][:5] else pause)

    async def run() -> None:
        await asyncio.gather(*(client(number) for number in range(streams)))

    def watch() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    asyncio.run(run())
    Path(output).write_text(json.dumps([read(*record) for record in records]))


@contextlib.contextmanager
def streaming(
    port: int,
    streams: int,
    tokens: int,
    output: Path,
    model: str = NAME,
    pause: float = 0.0,
) -> Iterator[None]:
    """Have so many streams ask, ``pause`` seconds after each answer; ``output`` has all."""
    what: Json = {"port": port, "streams": streams, "tokens": tokens, "output": str(output)}
    what |= {"model": model, "pause": pause}
    command = [sys.executable, "-m", "benchmarks.streams", json.dumps(what)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            time.sleep(5)  # imports
            yield
        finally:
            cast("Any", process.stdin).close()
            process.wait()


if __name__ == "__main__":
    _run(**json.loads(sys.argv[1]))
