"""Operations that have ended, written to the store beside the event loop."""

from __future__ import annotations

import asyncio
import logging

from liveprune.pruning.errors import StoreError
from liveprune.server.operations import Operation
from liveprune.server.store.store import Store

logger = logging.getLogger("liveprune")


class OperationRecords:
    """Call it with an operation that has ended, in the event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._writing: set[asyncio.Task[None]] = set()

    def __call__(self, operation: Operation) -> None:
        """Have it written; a database that fails is logged, and changes nothing else."""
        task = asyncio.create_task(self._write(operation))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def written(self) -> None:
        """Wait until all of them are."""
        await asyncio.gather(*self._writing)

    async def _write(self, operation: Operation) -> None:
        store = self._store
        try:
            await asyncio.to_thread(store.swaps.add, operation.to_json(), store.replica)
        except StoreError as error:
            logger.warning("operation %s is not recorded: %s", operation.id, error)
