"""The audit log: who asked for which change, and what became of it.

Two rows of the store per change, joined by its id: ``asked`` is written before anything happens, so
a change that cannot be recorded is refused; ``answered`` follows with the outcome. An ``asked``
without its ``answered`` was interrupted. Each row is also a line of JSON in the server's own log.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from liveprune.pruning.errors import EngineError, StoreError
from liveprune.server.store.store import Store

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
    """Writes to the store; every row is on disk before the call returns."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def asked(self, change: Change) -> None:
        """Record a change that is about to happen.

        Raises:
            EngineError: it could not be recorded, so it must not happen.
        """
        content = {key: x for key, x in asdict(change).items() if key != "id"}
        try:
            await self._record(change, "asked", content)
        except StoreError as error:
            raise EngineError(
                f"nothing was changed: the audit log cannot be written: {error}"
            ) from error

    async def answered(
        self, change: Change, status: int, *, operation: str | None = None, error: str | None = None
    ) -> None:
        """Record the outcome; it is too late to refuse, so a failure goes to the log alone."""
        content = {"status": status, "operation": operation, "error": error}
        try:
            await self._record(change, "answered", content)
        except StoreError:
            logger.exception("the audit log lacks the outcome of %s", change.id)

    def entries(self, limit: int = 1000) -> list[dict[str, Any]]:
        """The newest first: ``event``, ``id`` of the change, ``time`` in seconds since 1970, and
        what was recorded.
        """
        return [
            {"event": x["event"], "id": x["change"], "time": x["time"], **x["content"]}
            for x in self._store.audit.list(limit=limit)
        ]

    async def _record(self, change: Change, event: str, content: Mapping[str, Any]) -> None:
        logger.info("%s", json.dumps({"event": event, "id": change.id, **content}))
        # In a thread: a slow disk must not hold up the tokens that this process streams.
        store = self._store
        await asyncio.to_thread(store.audit.add, change.id, event, content, store.replica)
