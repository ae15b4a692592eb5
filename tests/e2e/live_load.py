"""Clients of a live server: streams that remember everything, and the CLI as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from liveprune.server.served_model import ServedModel

Golden = Mapping[tuple[str, str], str]
"""(variant's full name, prompt) -> what it answers."""


@dataclass
class Stream:
    """One streamed answer."""

    asked: str
    prompt: str
    header: str = ""
    models: set[str] = field(default_factory=set)
    text: str = ""
    finish: str = ""
    done: bool = False
    times: list[float] = field(default_factory=list)
    error: str = ""

    def problem(self, golden: Golden) -> str:
        """What is wrong with it; empty when all is well."""
        if self.error or not self.done or self.finish != "length":
            return f"failed or cut short: {self}"
        if self.models != {self.header}:
            return f"header says {self.header}, chunks say {self.models}"
        if self.asked.count(":") and self.asked != self.header:
            return f"asked for {self.asked}, answered by {self.header}"
        if self.text != golden[self.header, self.prompt]:
            expected = golden[self.header, self.prompt]
            return f"{self.header} said {self.text!r}, expected {expected!r}"
        return ""


def stream(base_url: str, model: str, prompt: str, tokens: int) -> Stream:
    """Ask for a greedy completion of exactly ``tokens`` tokens, streamed."""
    found = Stream(model, prompt)
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    try:
        with httpx.stream("POST", f"{base_url}/v1/completions", json=body, timeout=120) as answer:
            if answer.status_code != 200:
                answer.read()
                found.error = f"{answer.status_code}: {answer.text}"
                return found
            found.header = answer.headers["x-liveprune-variant"]
            for line in answer.iter_lines():
                _read(found, line)
    except httpx.HTTPError as error:
        found.error = f"{type(error).__name__}: {error}"
    return found


def _read(found: Stream, line: str) -> None:
    if not line.startswith("data: "):
        return
    if line == "data: [DONE]":
        found.done = True
        return
    chunk = json.loads(line.removeprefix("data: "))
    if "error" in chunk:
        found.error = str(chunk["error"])
        return
    found.models.add(chunk["model"])
    for choice in chunk["choices"]:
        found.text += choice["text"]
        found.finish = choice["finish_reason"] or found.finish
    found.times.append(time.monotonic())


class Load:
    """Threads that ask one thing after another until told to stop; a context manager."""

    def __init__(
        self,
        base_url: str,
        models: Sequence[str],
        prompts: Sequence[str],
        *,
        streams: int,
        tokens: int,
    ) -> None:
        self.finished: list[Stream] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(base_url, models, prompts, tokens, i))
            for i in range(streams)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(
        self, base_url: str, models: Sequence[str], prompts: Sequence[str], tokens: int, i: int
    ) -> None:
        while not self._stop.is_set():
            model, prompt = models[i % len(models)], prompts[i % len(prompts)]
            self.finished.append(stream(base_url, model, prompt, tokens))
            i += 1


def liveprune(
    server: ServedModel, state: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the CLI against ``server``, with the key of its state folder."""
    environment = {"LIVEPRUNE_STATE_DIR": str(state), "PATH": "/usr/bin:/bin", "HOME": str(state)}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return subprocess.run(
        [sys.executable, "-m", "liveprune.server", *arguments, "--admin-url", server.admin_url],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def metrics(url: str) -> dict[str, float]:
    """Samples of a Prometheus page: ``name{labels}`` -> value."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def json_of(done: subprocess.CompletedProcess[str]) -> Any:
    """What a command with ``--json`` printed; it must have succeeded."""
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)
