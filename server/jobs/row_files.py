"""Files of rows: what they hold, whether they are still the same, and parts of them put aside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from liveprune.pruning.calibration.rows import read_jsonl
from liveprune.pruning.errors import DataError
from liveprune.pruning.files import write_atomic

DEV_FRACTION = 0.3
"""Part of a source's rows that is put aside to measure the result on."""


def digest_of(path: Path) -> str:
    """Content digest of a file, 32 hex digits."""
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def check_same(name: str, path: Path, digest: str) -> None:
    """Refuse a file that is not the one that the job was started with.

    Raises:
        DataError: it changed, or is gone.
    """
    try:
        found = digest_of(path)
    except OSError as error:
        raise DataError(f"{name}: {path}: not readable: {error.strerror}") from error
    if found != digest:
        raise DataError(
            f"{name}: {path} has the digest {found}, expected {digest} as when the job was "
            f"started; start a new job for other rows"
        )


def measure_for(path: Path) -> str | None:
    """The measure that fits the first row's form; None where such rows cannot be measured.

    Raises:
        DataError: there is no row, or it is no JSON object.
    """
    first = next((row for _, row in read_jsonl(path, 1)), None)
    if first is None:
        raise DataError(f"{path}: found no rows, expected at least 1")
    return _measure_of(first)


def _measure_of(row: Mapping[str, object]) -> str | None:
    if "prompt" in row:
        if "choices" in row:
            return "choice"
        return "exact" if "answer" in row else "esap"
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    answered = isinstance(last, dict) and last.get("role") == "assistant"
    return None if last is None or answered else "esap"


def put_aside(path: Path, train: Path, dev: Path, *, seed: int, max_rows: int) -> None:
    """Write a part of ``path``, drawn by ``seed``, to ``dev``, and the rest to ``train``.

    Rows keep their order. The files are readable by their owner alone: rows may be users' prompts.

    Raises:
        DataError: there are fewer than two rows.
    """
    rows = [json.dumps(row) for _, row in read_jsonl(path, max_rows)]
    if len(rows) < 2:
        raise DataError(
            f"{path}: found {len(rows)} rows, expected at least 2: a part is put aside to measure "
            f"the result on"
        )
    count = min(max(1, round(DEV_FRACTION * len(rows))), len(rows) - 1)
    order = np.random.default_rng([seed, 0]).permutation(len(rows))
    aside = set(order[:count].tolist())
    write_private(dev, [row for i, row in enumerate(rows) if i in aside])
    write_private(train, [row for i, row in enumerate(rows) if i not in aside])


def write_private(path: Path, lines: Sequence[str]) -> None:
    """Write lines to a file that only its owner reads; whole or not at all."""
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    path.chmod(0o600)


def check_apart(train: Path, test: Path, max_rows: int) -> None:
    """Refuse to learn from rows that results are reported on.

    Raises:
        DataError: naming a row that both have.
    """
    seen = {json.dumps(row, sort_keys=True) for _, row in read_jsonl(test, max_rows)}
    for where, row in read_jsonl(train, max_rows):
        if json.dumps(row, sort_keys=True) in seen:
            raise DataError(
                f"{where}: found a row of the test set {test.name}, expected other rows to learn "
                f"from: a result chosen on its test set says nothing"
            )
