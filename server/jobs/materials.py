"""What a job works with, as it stays for the job's life: rows, or statistics, in its own folder.

What changes while the server runs (statistics, kept prompts) is copied once, when the job first
runs, so that a job that goes on after a crash ends with the plan that it would have found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from liveprune.pruning.errors import DataError
from liveprune.pruning.files import write_atomic
from liveprune.server.jobs.request import StoredRequest
from liveprune.server.jobs.row_files import check_same, measure_for, put_aside, write_private

STATISTICS_FILE = "statistics.safetensors"
PROMPTS_FILE = "prompts.jsonl"
LABEL_FREE = "esap"
"""Measure of prompts whose answers nobody checked."""


@dataclass(frozen=True)
class Materials:
    """Files of one job."""

    measure: str | None
    """None: there are no rows to measure on."""
    train: Path | None = None
    """Rows to learn from."""
    statistics: Path | None = None
    """Or statistics."""
    dev: Path | None = None
    """None: nothing to measure on, or (a search) a part of ``train``."""
    test: Path | None = None


def gather(
    stored: StoredRequest, folder: Path, prompts: Path, fetch_statistics: Callable[[], bytes]
) -> Materials:
    """Check the files of a request, copy what changes, put rows aside.

    Args:
        stored: the request.
        folder: the job's.
        prompts: folder of the kept prompts.
        fetch_statistics: asks the server for its live statistics, as a file's content.

    Raises:
        DataError: a file is not as it was when the job was started, or has too few rows.
        EngineError: the server gives no statistics.
    """
    request = stored.request
    files = {"data": request.source.data, "dev": request.dev, "test": request.test}
    for name, digest in stored.digests.items():
        check_same(name, Path(str(files[name])), digest)
    dev, test = (None if text is None else Path(text) for text in (request.dev, request.test))
    statistics = None
    if request.source.statistics is not None:
        statistics = folder / STATISTICS_FILE
        if not statistics.exists():
            write_atomic(statistics, fetch_statistics())
        source = None
    elif request.source.prompts is not None:
        source = _snapshot(prompts, folder / PROMPTS_FILE)
    else:
        source = Path(str(request.source.data))
    measure = request.measure or _measure(source, dev, test, kept=request.source.prompts)
    train = source
    aside = source is not None and dev is None and measure is not None and not request.searches
    if source is not None and aside:
        train, dev = folder / "train.jsonl", folder / "dev.jsonl"
        if not train.exists():  # written last
            put_aside(source, train, dev, seed=request.seed, max_rows=request.max_rows)
    return Materials(measure, train, statistics, dev, test)


def _measure(
    source: Path | None, dev: Path | None, test: Path | None, *, kept: str | None
) -> str | None:
    if kept is not None:
        return LABEL_FREE
    first = dev or test or source
    return None if first is None else measure_for(first)


def _snapshot(prompts: Path, copy: Path) -> Path:
    if not copy.exists():
        lines: list[str] = []
        for path in sorted(prompts.glob("*.jsonl")):
            lines += [line for line in path.read_text(encoding="utf-8").splitlines() if line]
        if not lines:
            raise DataError(f"{prompts}: found no kept prompts, expected some")
        write_private(copy, lines)
    return copy
