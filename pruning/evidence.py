"""What a method judges by: calibration rows, the statistics of a pass over them, the weights."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from liveprune.pruning.calibration.rows import MAX_ROWS, MAX_TOKENS, Rows, load_rows
from liveprune.pruning.calibration.statistics import RoutingStatistics
from liveprune.pruning.calibration.weights import Weights
from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.errors import DataError
from liveprune.pruning.given_statistics import load_given
from liveprune.pruning.methods.method import Method
from liveprune.pruning.model_spec import ModelSpec


@dataclass(frozen=True)
class Calibration:
    """Where calibration rows come from, and how the pass over them runs."""

    files: tuple[Path, ...] = ()
    max_tokens: int = MAX_TOKENS
    max_rows: int = MAX_ROWS
    """Of each file."""
    device: str = "cpu"
    """``cpu`` or a CUDA device."""
    cache: Path | None = None
    """Folder that keeps the results of passes."""
    statistics: Path | None = None
    """File with the result of a pass, or of live traffic, in place of rows."""

    def check(self) -> None:
        """Refuse a device that is not there, and a cache that is no folder.

        Raises:
            DataError: naming what was found.
        """
        import torch

        available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if self.device not in (*available, *(["cuda"] if len(available) > 1 else [])):
            raise DataError(
                f"device: found {self.device!r}, expected one of {', '.join(available)}"
            )
        if self.cache is not None and self.cache.exists() and not self.cache.is_dir():
            raise DataError(f"statistics cache {self.cache}: found a file, expected a folder")


@dataclass(frozen=True)
class Evidence:
    """What there is to judge by; empty or None where the method does not need it."""

    corpora: tuple[Rows, ...]
    """The rows of each file, or all in one where the method takes one set."""
    statistics: tuple[RoutingStatistics, ...]
    """Of each of ``corpora``; one that was given has none."""
    weights: Weights | None

    @property
    def digest(self) -> str | None:
        """Of the rows as tokenised, or as the statistics were given."""
        if self.statistics and not self.corpora:
            return self.statistics[0].calibration
        if len(self.corpora) <= 1:
            return self.corpora[0].digest if self.corpora else None
        joined = "".join(rows.digest for rows in self.corpora)
        return hashlib.blake2b(joined.encode(), digest_size=16).hexdigest()


def gather(
    model: Path,
    spec: ModelSpec,
    method: Method,
    calibration: Calibration,
    *,
    statistics: bool,
    progress: Callable[[int, int], None] | None,
) -> Evidence:
    """Read what ``method`` needs; with ``statistics`` a pass is made in any case.

    Raises:
        DataError: rows are missing or unusable.
        CheckpointError: the weights are missing, damaged or quantised.
    """
    needs_pass = method.needs_statistics or statistics
    if calibration.statistics is not None and (needs_pass or method.reads_rows):
        return _given(model, spec, method, calibration, calibration.statistics, statistics)
    needs_rows = method.needs_calibration or needs_pass
    if needs_rows:
        calibration.check()
    weights = Weights(model, spec) if needs_rows or method.reads_weights else None
    corpora = _corpora(model, spec, method, calibration) if needs_rows else ()
    found = []
    if needs_pass:
        found = [_observed(model, x, calibration, method.needs, progress) for x in corpora]
    return Evidence(corpora, tuple(found), weights)


def _given(
    model: Path,
    spec: ModelSpec,
    method: Method,
    calibration: Calibration,
    path: Path,
    super_experts: bool,
) -> Evidence:
    if calibration.files:
        raise DataError(
            f"found calibration rows and the statistics {path}, expected one of the two"
        )
    found = load_given(path, model, spec, method, super_experts=super_experts)
    weights = Weights(model, spec) if method.reads_weights else None
    return Evidence((), (found,), weights)


def _corpora(
    model: Path, spec: ModelSpec, method: Method, calibration: Calibration
) -> tuple[Rows, ...]:
    if not calibration.files:
        asker = f"method {method.name}" if method.needs_calibration else "keep_super_experts"
        raise DataError(f"{asker} needs calibration rows: found none, expected a JSONL file")
    vocab_size = int(spec.config.get("vocab_size") or sys.maxsize)
    corpora = [
        load_rows(
            file,
            model,
            vocab_size=vocab_size,
            max_tokens=calibration.max_tokens,
            max_rows=calibration.max_rows,
        )
        for file in calibration.files
    ]
    if method.from_corpora is not None:
        return tuple(corpora)
    return (Rows(tuple(ids for rows in corpora for ids in rows.token_ids)),)


def _observed(
    model: Path,
    rows: Rows,
    calibration: Calibration,
    extras: Collection[str],
    progress: Callable[[int, int], None] | None,
) -> RoutingStatistics:
    """Run the observer pass, or find its result in the cache."""
    from liveprune.pruning.calibration.observer import observe

    path = None
    if calibration.cache is not None:
        key = "".join((fingerprint_model(model), rows.digest, *sorted(extras)))
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        path = calibration.cache / f"{name}.safetensors"
        if path.exists():
            return RoutingStatistics.load(path)
    found = observe(model, rows, device=calibration.device, extras=extras, progress=progress)
    if path is not None:
        found.save(path)
    return found


def as_files(calibration: Path | Sequence[Path] | None) -> tuple[Path, ...]:
    """None, one or several files."""
    if calibration is None:
        return ()
    return (calibration,) if isinstance(calibration, Path) else tuple(calibration)
