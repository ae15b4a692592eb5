"""What runs in a process of Ray's: one engine, and who it is that answers."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import liveprune
from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.errors import EngineError
from liveprune.pruning.evaluation.engine import Engine
from liveprune.pruning.plan import Plan

DISTRIBUTIONS = ("liveprune", "numpy", "torch", "transformers", "vllm")
"""What an engine's numbers hang on."""


class Description(Protocol):
    """What an actor makes its engine of; it can be pickled."""

    @property
    def model(self) -> Path:
        """Checkpoint folder."""

    @property
    def gpus(self) -> int:
        """That the engine uses, where there are any."""

    def started(self) -> AbstractContextManager[Engine]:
        """The engine, in the process where this is called."""


@dataclass(frozen=True)
class Process:
    """Where an actor runs."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"


def identity(model: Path) -> dict[str, str]:
    """What all actors must have in common for their answers to be one engine's.

    Raises:
        CheckpointError: there is no readable checkpoint in the folder.
    """
    found = {name: _version(name) for name in DISTRIBUTIONS}
    found["source of liveprune"] = _source_digest(Path(liveprune.__file__).parent)
    found[f"checkpoint {model}"] = fingerprint_model(model)
    return found


class EngineActor:
    """One engine. A class of ours until ``ray_pool`` makes it an actor's."""

    def __init__(self, description: Description) -> None:
        """Quick, so that Ray can say early who has found a place."""
        self._description = description
        self._stack = ExitStack()
        self._engine: Engine | None = None

    def introduce(self) -> tuple[Process, dict[str, str]]:
        """Where this is, and its ``identity``."""
        return Process(socket.gethostname(), os.getpid()), identity(self._description.model)

    def start(self) -> None:
        """Start the engine; its errors are the caller's."""
        self._engine = self._stack.enter_context(self._description.started())

    def ask(
        self, method: str, plans: Sequence[Plan | None], data: Any, options: dict[str, Any]
    ) -> list[Any]:
        """``score`` or ``generate``: one result for each plan, ``data`` being rows or prompts.

        Raises:
            EngineError: a plan cannot be run, or the engine failed.
        """
        results: list[Any] = getattr(self._engine, method)(plans, data, **options)
        if len(results) != len(plans):
            raise EngineError(
                f"{method}: found {len(results)} results, expected one for each of {len(plans)} "
                f"plans"
            )
        return results

    def close(self) -> None:
        """Stop the engine."""
        self._engine = None
        self._stack.close()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _source_digest(package: Path) -> str:
    """Of every Python file's path and content: images of one version number may differ."""
    state = hashlib.blake2b(digest_size=8)
    # os.walk, since the package's folders are links in a checkout, which rglob does not follow.
    files = (
        Path(folder, name)
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if name.endswith(".py")
    )
    for path in sorted(files):
        state.update(path.relative_to(package).as_posix().encode())
        state.update(path.read_bytes())
    return state.hexdigest()
