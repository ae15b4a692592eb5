"""Which files a request may name: those inside allowed folders, symbolic links followed first."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path

from liveprune.pruning.errors import DataError, PlanError
from liveprune.pruning.plan_io import CHECKPOINT_PLAN

MAX_PLAN_BYTES = 256 * 2**20
"""Plans take kilobytes, with matrices megabytes; a shard named by mistake must not fill memory."""

MAX_ROW_BYTES = 2**30


def default_roots(state: Path) -> tuple[Path, ...]:
    """The working directory and the state folder; never the whole file system."""
    here = Path.cwd()
    return (state,) if here == Path(here.anchor) else (here, state)


class AllowedPaths:
    """Folders below which plans, and rows, may lie."""

    def __init__(self, roots: Sequence[Path]) -> None:
        """A relative path in a request is taken from the first of ``roots``."""
        self.roots = tuple(root.resolve() for root in roots)

    def plan(self, text: str) -> Path:
        """Check the path of a plan file, or of a pruned checkpoint's folder; return it resolved.

        Every file that reading the plan opens is checked: the JSON and the matrices beside it.
        The caller opens the resolved path, so that no link of the original one is followed again.
        Somebody who can replace folders inside a root between check and use could still lead the
        server elsewhere; so whoever can write to a root is trusted with what the server can read.

        Raises:
            PlanError: outside the roots, missing, no regular file, or far too large for a plan.
        """
        try:
            path = self._inside(self.roots[0] / text, text)
            file = self._inside(path / CHECKPOINT_PLAN, text) if path.is_dir() else path
            _check_file(file, "a plan", MAX_PLAN_BYTES)
            matrices = _matrices(file)
            if matrices is not None:
                _check_file(self._inside(file.parent / matrices, text), "a plan", MAX_PLAN_BYTES)
        except (OSError, RuntimeError, ValueError) as error:
            # RuntimeError: links in a circle. ValueError: a null byte in the path.
            reason = getattr(error, "strerror", None) or error
            raise PlanError(f"{text!r}: not readable as a plan: {reason}") from error
        return path

    def rows(self, text: str) -> Path:
        """Check the path of a file of rows; return it resolved, as ``plan`` does.

        Raises:
            DataError: outside the roots, missing, no regular file, or too large to be read.
        """
        try:
            path = self._inside(self.roots[0] / text, text)
            _check_file(path, "rows", MAX_ROW_BYTES)
        except PlanError as error:
            raise DataError(str(error)) from error
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{text!r}: not readable as rows: {reason}") from error
        return path

    def _inside(self, path: Path, text: str) -> Path:
        resolved = path.resolve()
        if not any(resolved.is_relative_to(root) for root in self.roots):
            roots = ", ".join(map(str, self.roots))
            raise PlanError(f"{text!r}: leads outside the allowed folders; expected one in {roots}")
        return resolved


def _check_file(path: Path, kind: str, most: int) -> None:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise PlanError(f"{path}: expected a regular file")  # reading a pipe would wait for ever
    if found.st_size > most:
        raise PlanError(
            f"{path}: found {found.st_size:,} bytes, expected {kind} of at most {most:,}"
        )


def _matrices(file: Path) -> str | None:
    """The file beside a plan that its JSON names; None for any other form."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None
    name = content.get("matrices") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None
