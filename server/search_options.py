"""What ``liveprune prune --method eep`` is asked for, checked before anything long starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import PlanError
from liveprune.pruning.search.presets import Settings, preset
from liveprune.server.cli_options import parse_changes


@dataclass(frozen=True)
class SearchOptions:
    """One search."""

    model: Path
    """Checkpoint folder."""
    folder: Path
    """Where the search keeps what it did, and its report."""
    train: Path
    experts: str | Sequence[int]
    dev: Path | None = None
    test: Path | None = None
    measure: str = "exact"
    chat: bool = False
    """Prompts go through the chat template."""
    top_k: int | None = None
    settings: Settings = field(default_factory=Settings)
    starts: Sequence[str] = ()
    """One-pass methods, calibrated on the train rows, whose prunings are tried first."""
    seed: int = 0
    engine: str = "vllm"
    """``vllm``, ``transformers``, or the URL of a server's admin API."""
    admin_key_file: Path | None = None
    actors: int | None = None
    """Engines, each in an actor of Ray; None is one engine in this process."""
    ray_address: str | None = None
    """Of a running Ray cluster: ``HOST:PORT``, or ``auto``; None starts one on this machine."""
    dtype: str = "auto"
    max_rows: int | None = None
    max_answer_tokens: int = 64
    expert_parallel: int = 1
    """Ranks that the result is to be served on with expert parallelism."""
    command: str = ""
    """What was typed, for the report."""


def parse_settings(name: str, changes: Sequence[str], **given: Any) -> Settings:
    """The preset ``name`` with ``NAME=VALUE`` changes, and those ``given`` that are not None.

    Raises:
        PlanError: no such preset or hyper-parameter, or a value that it cannot have.
    """
    named = {key: value for key, value in given.items() if value is not None}
    for key, value in parse_changes(changes).items():
        if key in named:
            raise PlanError(f"--set: found {key} twice, expected it once")
        named[key] = _checked(key, value)
    return preset(name, **named)


def _checked(key: str, value: object) -> object:
    """A number, true, false, or a plain word where the field takes one."""
    defaults = {x.name: x.default for x in dataclasses.fields(Settings)}
    text = value if isinstance(value, str) else json.dumps(value)
    if isinstance(defaults.get(key), bool) != isinstance(value, bool) and key in defaults:
        expected = "true or false" if isinstance(defaults[key], bool) else "a number or a word"
        raise PlanError(f"--set {key}: found {text!r}, expected {expected}")
    if isinstance(defaults.get(key), int | float) and not isinstance(value, int | float):
        raise PlanError(f"--set {key}: found {text!r}, expected a number")
    return value
