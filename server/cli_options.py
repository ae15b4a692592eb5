"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from liveprune.pruning.errors import PlanError

ModelArgument = Annotated[str, typer.Argument(help="Checkpoint folder, or a name on the hub.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes.")]


def check_output(output: Path, *, is_file: bool) -> None:
    """Refuse an output that is taken, or cannot be made, before hours of work."""
    empty = not is_file and output.is_dir() and not any(output.iterdir())
    if output.exists() and not empty:
        expected = "a new file" if is_file else "a new or empty folder"
        raise FileExistsError(f"{output}: exists already; expected {expected}")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise NotADirectoryError(f"{output}: {parent} is not a folder that can be written to")


def budget(experts: str, model: Path) -> str | list[int]:
    """``@FILE`` names a file that states counts, as other projects' configs do."""
    if not experts.startswith("@"):
        return experts
    from liveprune.pruning.foreign import read_counts
    from liveprune.pruning.model_spec import ModelSpec

    return read_counts(Path(experts[1:]), ModelSpec.from_path(model))


def numbers(option: str, text: str) -> list[int]:
    """``0,1,2`` as a list."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise PlanError(f"{option}: found {text!r}, expected numbers like 0,1,2") from None


def number_or_list(option: str, text: str | None) -> int | list[int] | None:
    """One number for all layers, or one each."""
    found = numbers(option, text or "")
    if not found:
        return None
    return found if "," in str(text) else found[0]


def parse_changes(changes: Sequence[str]) -> dict[str, object]:
    """``NAME=VALUE`` of ``--set``: a value is JSON, or a plain word."""
    named: dict[str, object] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise PlanError(f"--set: found {change!r}, expected NAME=VALUE")
        if key in named:
            raise PlanError(f"--set: found {key} twice, expected it once")
        try:
            named[key] = json.loads(text)
        except ValueError:
            named[key] = text
    return named
