"""JSON files of the state folder: of one version and for one base model, or refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from liveprune.pruning.errors import CheckpointError, VariantError

Parsed = TypeVar("Parsed")


def read_form(
    path: Path, version: int, base: Mapping[str, str], parse: Callable[[dict[str, Any]], Parsed]
) -> Parsed | None:
    """Read ``path`` and parse it; None if there is no such file.

    Args:
        path: the file.
        version: that it must have.
        base: fingerprint of the model that it must be for.
        parse: of everything else in it; raises where it would not have been written so.

    Raises:
        CheckpointError: unreadable, another version or base model, or damaged.
    """
    try:
        form: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    return parse_form(str(path), form, version, base, parse)


def parse_form(
    where: str,
    form: Any,
    version: int,
    base: Mapping[str, str],
    parse: Callable[[dict[str, Any]], Parsed],
) -> Parsed:
    """Parse what ``read_form`` reads, from wherever it is; ``where`` begins the errors.

    Raises:
        CheckpointError: another version or base model, or damaged.
    """
    found = form.pop("version", None) if isinstance(form, dict) else None
    if found != version:
        raise CheckpointError(f"{where}: version is {found!r}; this release reads {version}")
    if (model := form.pop("base", None)) != base:
        raise CheckpointError(
            f"{where}: holds the variants of the base model {model}, expected {base}; choose "
            "another state folder, or empty this one to start afresh"
        )
    try:
        return parse(form)
    except (AttributeError, KeyError, TypeError, ValueError, VariantError) as error:
        raise CheckpointError(
            f"{where}: damaged: {type(error).__name__}: {error}; restore it from a backup, or "
            "delete it and add the variants again"
        ) from error


def base_fingerprint(base: Path) -> dict[str, str]:
    """What tells one base model from another: its resolved path, and a digest of its config.

    Raises:
        CheckpointError: there is no readable ``config.json``.
    """
    path = base / "config.json"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return {"model": str(base.resolve()), "config": digest}
