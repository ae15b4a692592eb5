"""Run checkpoints in real vLLM engines, several one after another in one subprocess.

A subprocess keeps vLLM's global state and its warnings out of the test process; sharing it saves
the seconds that importing vLLM takes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("engine_worker.py")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
PLUGINS = "VLLM_PLUGINS"


@dataclass(frozen=True)
class Job:
    """One engine: load ``model``, then generate for all prompts twice."""

    name: str
    model: str
    prompts: Sequence[Sequence[int]]
    """Token ids."""
    tokens: int
    compiled: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ``vllm.LLM``."""


@dataclass(frozen=True)
class Outcome:
    """What an engine did; or how it failed: then only ``error`` and ``tensors_read`` say much."""

    cold: list[list[int]]
    """Greedy tokens of each prompt, empty prefix cache."""
    warm: list[list[int]]
    """The same again, with the prefixes of the first run cached."""
    cached: list[int]
    """Prompt tokens that the warm run took from the prefix cache."""
    logprobs: list[list[float]]
    """Of each prompt, log p(token i | tokens before i) for i >= 1."""
    layers: dict[str, list[Any]] | None
    """The config's ``liveprune_layers``."""
    classes: dict[str, str]
    """Class of every module of the model, and of every router, by name."""
    tensors_read: int
    error: str = ""
    """Type and text of the exception that refused the model."""


def run_jobs(
    jobs: Sequence[Job], folder: Path, environment: Mapping[str, str] | None = None
) -> dict[str, Outcome]:
    """Run ``jobs`` in one subprocess, with its files and log in ``folder``.

    ``environment`` adds to the environment, e.g. ``{"VLLM_PLUGINS": ""}`` for vLLM without plugins.
    """
    outcomes = run_script(
        WORKER,
        [dataclasses.asdict(job) for job in jobs],
        folder,
        # A cache of its own: compiled code of an earlier run must not stand in for today's.
        own_cache=any(job.compiled for job in jobs),
        environment=environment,
    )
    return {name: Outcome(**outcome) for name, outcome in outcomes.items()}


def run_script(
    script: Path,
    question: Any,
    folder: Path,
    *,
    own_cache: bool = False,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run ``script QUESTION ANSWER`` in vLLM's environment; both are JSON files in ``folder``."""
    asked, answer = folder / "question.json", folder / "answer.json"
    asked.write_text(json.dumps(question))
    inherited = {key: value for key, value in os.environ.items() if key != PLUGINS}
    cache = {"VLLM_CACHE_ROOT": str(folder / "cache")} if own_cache else {}
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            [sys.executable, str(script), str(asked), str(answer)],
            env=inherited | ENVIRONMENT | cache | dict(environment or {}),
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        tail = (folder / "log.txt").read_text(errors="replace")[-4000:]
        raise RuntimeError(f"{script.name} ended with {done.returncode}:\n{tail}")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found
