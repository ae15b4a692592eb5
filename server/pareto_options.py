"""What ``liveprune pareto`` is asked for, and its rows, checked before anything long starts."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liveprune.pruning.calibration.rows import MAX_ROWS, load_rows
from liveprune.pruning.errors import DataError
from liveprune.pruning.evaluation.task import Task, load_task
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.pareto.grid import Budget
from liveprune.pruning.search.presets import Settings

SEARCH = "eep"


@dataclass(frozen=True)
class ParetoOptions:
    """One grid."""

    model: Path
    """Checkpoint folder."""
    folder: Path
    """Where plans, answers and the report are kept."""
    methods: Sequence[str]
    budgets: Mapping[str, Budget]
    """By label."""
    data: Sequence[Path]
    """JSONL rows that plans are scored on; a task each."""
    top_ks: Sequence[int | None] = (None,)
    calibration: Sequence[Path] = ()
    train: Path | None = None
    """Of methods that search."""
    dev: Path | None = None
    settings: Settings = field(default_factory=Settings)
    measure: str = "exact"
    chat: bool = False
    seeds: int = 3
    seed: int = 0
    controls: bool = True
    engine: str = "vllm"
    """``vllm``, ``transformers``, or the URL of a server's admin API."""
    admin_key_file: Path | None = None
    actors: int | None = None
    """Engines, each in an actor of Ray; None is one engine in this process."""
    ray_address: str | None = None
    """Of a running Ray cluster: ``HOST:PORT``, or ``auto``; None starts one on this machine."""
    dtype: str = "auto"
    device: str = "cpu"
    """Where the observer pass runs."""
    max_rows: int | None = None
    max_answer_tokens: int = 64
    rounds: int = 5
    """Timed for each plan; 0 times nothing."""
    batch: int = 8
    prompt_tokens: int = 128
    new_tokens: int = 33
    command: str = ""
    """What was typed, for the report."""

    def arguments(self, sets: Mapping[str, Task]) -> dict[str, Any]:
        """What the plans hang on, the model and the grid's own rows aside."""
        searched = {"settings": dataclasses.asdict(self.settings)} if sets else {}
        return {
            "methods": list(self.methods),
            "experts": {k: v if isinstance(v, str) else list(v) for k, v in self.budgets.items()},
            "top_k": list(self.top_ks),
            "seeds": self.seeds,
            "seed": self.seed,
            "controls": self.controls,
            "calibration": [_content(path) for path in self.calibration],
            "calibration_rows": self.max_rows or MAX_ROWS,
            "device": self.device,
            **{name: task.digest for name, task in sets.items()},
            **searched,
        }


def load_tasks(options: ParetoOptions) -> dict[str, Task]:
    """By the name of the file.

    Raises:
        DataError: two files have the same name or the same rows, or hold calibration rows.
    """
    tasks: dict[str, Task] = {}
    for path in options.data:
        name = path.name.removesuffix(".jsonl")
        task = _task(path, options)
        same = [other for other, x in tasks.items() if x.digest == task.digest]
        if name in tasks or same:
            other = f"the rows of {same[0]}" if same else f"another file named {name}"
            raise DataError(f"--data {path}: found {other} again, expected each once")
        for calibration in options.calibration:
            if _content(calibration) == _content(path):
                raise DataError(
                    f"--data {path}: found among --calibration, too ({calibration}); expected "
                    f"rows that no method has seen"
                )
        tasks[name] = task
    return tasks


def check_calibration(options: ParetoOptions, spec: ModelSpec) -> None:
    """Read the rows once, and look for the device: every plan would fail of them, one by one.

    Raises:
        DataError: rows are unusable, or there is no such device.
    """
    most = options.max_rows or MAX_ROWS
    vocabulary = int(spec.config.get("vocab_size") or sys.maxsize)
    for path in options.calibration:
        load_rows(path, options.model, vocab_size=vocabulary, max_rows=most)
    if options.device != "cpu":
        import torch

        if not options.device.startswith("cuda") or not torch.cuda.is_available():
            raise DataError(
                f"--device: found {options.device!r}, expected cpu"
                + (" or cuda" if torch.cuda.is_available() else ": there is no GPU here")
            )


def load_search_sets(options: ParetoOptions, tasks: Mapping[str, Task]) -> dict[str, Task]:
    """Rows of methods that search.

    Raises:
        DataError: there is no ``train``, or plans are to be scored on rows of it.
    """
    if options.train is None:
        raise DataError(f"--train: missing, expected for method {SEARCH}")
    paths = {"train": options.train, "dev": options.dev}
    sets = {name: _task(path, options) for name, path in paths.items() if path is not None}
    for name, task in sets.items():
        for other, scored in tasks.items():
            if task.digest == scored.digest:
                raise DataError(f"--{name}: found the rows of --data {other}, expected others")
    return sets


def _task(path: Path, options: ParetoOptions) -> Task:
    return load_task(
        path,
        options.model,
        measure=options.measure,
        max_rows=options.max_rows,
        max_answer_tokens=options.max_answer_tokens,
        chat=options.chat,
    )


def _content(path: Path) -> str:
    """Digest of a file, 32 hex digits: its name may change, its rows may not."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: not readable: {error}") from error
