"""The demo's shipped rows as JSONL files.

python -m liveprune.pruning.demo.rows --output DIR     writes {task}.{split}.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from liveprune.pruning.demo.tasks import SPLITS, Row, split_rows, task_names


def read_rows(path: Path) -> list[Row]:
    """Rows of one JSONL file written by `write_splits`."""
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def write_splits(directory: Path) -> None:
    """Write `{task}.{split}.jsonl` for every task and shipped split."""
    directory.mkdir(parents=True, exist_ok=True)
    for task, split in itertools.product(task_names(), SPLITS):
        lines = (json.dumps(asdict(row)) + "\n" for row in split_rows(task, split))
        (directory / f"{task}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: write the shipped rows."""
    parser = argparse.ArgumentParser(description="Write the demo's train, dev and test rows.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSONL files")
    write_splits(parser.parse_args(arguments).output)


if __name__ == "__main__":
    main()
