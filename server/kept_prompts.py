"""Some of the users' prompts and answers, kept for a while where the operator wants that.

Off by default. A row is a file of one JSON line in ``prompts/`` of the model's state folder, mode
0600, so that one can be deleted without touching another: the oldest go when there are too many or
they are too old. Nothing of them is ever logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from liveprune.pruning.errors import DataError
from liveprune.pruning.files import write_atomic
from liveprune.server.prompt_rows import Row

FOLDER = "prompts"
REDACTED = "[redacted]"
DAY = 86400.0
LONGEST = 1 << 18
"""Bytes of a row; longer ones are not kept."""
TIDY_SECONDS = 600.0

logger = logging.getLogger("liveprune.prompts")


def redactions(patterns: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    """Compile ``--redact``.

    Raises:
        DataError: one is not a regular expression.
    """
    found = []
    for pattern in patterns:
        try:
            found.append(re.compile(pattern))
        except re.error as error:
            raise DataError(
                f"--redact: found {pattern!r}, expected a regular expression ({error})"
            ) from error
    return tuple(found)


class KeptPrompts:
    """The rows of one model; callable from any thread."""

    def __init__(
        self,
        folder: Path,
        *,
        share: float = 0.0,
        most: int = 1000,
        days: float = 7.0,
        redact: Sequence[re.Pattern[str]] = (),
        now: Callable[[], float] = time.time,
    ) -> None:
        """What is too old already is deleted at once, also with a ``share`` of 0.

        Args:
            folder: state folder of the model.
            share: of the requests to the alias that are kept, 0 to 1, drawn at random.
            most: rows kept; the oldest go first.
            days: that a row is kept.
            redact: what they match in prompts and answers becomes ``[redacted]``.
            now: seconds since 1970.
        """
        self.share = share
        self._folder = folder / FOLDER
        self._most, self._seconds, self._redact, self._now = most, days * DAY, redact, now
        self._draw = random.SystemRandom()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.tidy()

    def draw(self) -> bool:
        """Whether to keep the request that comes now."""
        return self._draw.random() < self.share

    def keep(self, row: Row) -> None:
        """Write a row, and delete what is too much or too old by now.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        line = (json.dumps(self._redacted(row), ensure_ascii=False) + "\n").encode()
        if len(line) > LONGEST:
            return
        name = f"{int(1000 * self._now()):015d}-{uuid.uuid4().hex[:8]}.jsonl"
        write_atomic(self._folder / name, line, mode=0o600)
        self.tidy()

    def tidy(self) -> None:
        """Delete rows that are too old, and the oldest of too many."""
        oldest = int(1000 * (self._now() - self._seconds))
        files = self._files()
        old = [file for file in files if int(file.name.partition("-")[0]) < oldest]
        for file in [*old, *files[len(old) : max(len(files) - self._most, 0)]]:
            file.unlink(missing_ok=True)

    def export(self, path: Path) -> int:
        """Write all rows to one JSONL file with mode 0600, the oldest first; returns how many.

        Raises:
            DataError: there are none.
        """
        self.tidy()
        lines = []
        for file in self._files():
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                lines.append(file.read_bytes())
        if not lines:
            raise DataError(
                "kept prompts: found none, expected some (--keep-prompts keeps a share of the "
                "requests to the bare model name)"
            )
        write_atomic(path, b"".join(lines), mode=0o600)
        return len(lines)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Be the one that requests are shown to, and delete in time."""
        global _installed  # noqa: PLW0603 - one server in a process
        task = asyncio.create_task(self._keep_tidy(), name="kept prompts")
        _installed = self
        try:
            yield
        finally:
            _installed = None
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _keep_tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            try:
                await asyncio.to_thread(self.tidy)
            except OSError as error:
                logger.warning("old prompts could not be deleted: %s", error)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*-*.jsonl"))

    def _redacted(self, row: Row) -> Row:
        changed: Row = {key: self._clean(row[key]) for key in ("prompt", "answer") if key in row}
        if "messages" in row:
            changed["messages"] = [
                {**message, "content": self._clean(message["content"])}
                for message in row["messages"]
            ]
        return {**row, **changed}

    def _clean(self, text: str) -> str:
        for pattern in self._redact:
            text = pattern.sub(REDACTED, text)
        return text


_installed: KeptPrompts | None = None


def installed() -> KeptPrompts | None:
    """Those of the running server; None where none are kept."""
    return _installed
