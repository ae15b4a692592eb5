"""The audit log: who asked for which change, and what became of it.

Two JSON lines per change, joined by ``id``: ``asked`` is on disk before anything happens, so a
change that cannot be recorded is refused; ``answered`` follows with the outcome. An ``asked``
without its ``answered`` was interrupted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import EngineError

AUDIT_FILE = "audit.log"

logger = logging.getLogger("liveprune.audit")


@dataclass(frozen=True)
class Change:
    """One request that changes something."""

    who: str
    """Fingerprint of the key."""
    remote: str
    """Address that the connection comes from."""
    method: str
    path: str
    parameters: Mapping[str, Any]
    """What was asked for; never a header, so never a key."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class AuditLog:
    """Appends to one file, mode 0600; every line is on disk before the call returns."""

    def __init__(self, path: Path) -> None:
        """Make the folder and the file.

        Raises:
            OSError: it cannot be written to.
        """
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(self._open())

    async def asked(self, change: Change) -> None:
        """Record a change that is about to happen.

        Raises:
            EngineError: it could not be recorded, so it must not happen.
        """
        try:
            await self._record({"event": "asked", **asdict(change)})
        except OSError as error:
            raise EngineError(
                f"nothing was changed: the audit log {self.path} cannot be written: {error}"
            ) from error

    async def answered(
        self, change: Change, status: int, *, operation: str | None = None, error: str | None = None
    ) -> None:
        """Record the outcome; it is too late to refuse, so a failure goes to the log alone."""
        try:
            await self._record(
                {
                    "event": "answered",
                    "id": change.id,
                    "status": status,
                    "operation": operation,
                    "error": error,
                }
            )
        except OSError:
            logger.exception("the audit log %s lacks the outcome of %s", self.path, change.id)

    async def _record(self, entry: Mapping[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **entry})
        logger.info("%s", line)
        # In a thread: a slow disk must not hold up the tokens that this process streams.
        await asyncio.to_thread(self._append, f"{line}\n".encode())

    def _append(self, line: bytes) -> None:
        with self._lock:
            handle = self._open()
            try:
                size = os.fstat(handle).st_size
                written = os.write(handle, line)
                if written < len(line):
                    os.ftruncate(handle, size)  # half a line would spoil the next one
                    raise OSError(f"{written} of {len(line)} bytes written")
                os.fsync(handle)
            finally:
                os.close(handle)

    def _open(self) -> int:
        # At every line, so that the file can be moved away (log rotation).
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self.path, flags, 0o600)
