"""Swaps this server's alias to what an experiment shipped: once, and never over an operator."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from liveprune.pruning.errors import ConflictError, LiveprunError, StoreError
from liveprune.server.control_plane import ControlPlane
from liveprune.server.operations import State
from liveprune.server.store.decisions import Promotion
from liveprune.server.store.store import Store

POLL = 0.25
BACKOFF = (10.0, 600.0)
"""Seconds before a swap that failed is tried again, doubled each time up to the second."""

logger = logging.getLogger("liveprune.experiments")


class Promoter:
    """Carries out the promotions of one replica, in the background."""

    def __init__(
        self,
        store: Store,
        control: ControlPlane,
        *,
        poll: float = POLL,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Args:
        store: of the model.
        control: the live variants.
        poll: seconds between looks at a swap.
        clock: seconds, of anything; None: the event loop's.
        """
        self._store, self._control, self._poll = store, control, poll
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self._not_before = 0.0

    async def look(self) -> None:
        """Begin a swap, if one is asked for and none is under way.

        Raises:
            StoreError: the database failed.
        """
        if (self._task is not None and not self._task.done()) or self._now() < self._not_before:
            return
        found = await asyncio.to_thread(self._store.decisions.promotions)
        mine = [x for x in found if x.replica == self._store.replica]
        if mine:
            self._task = asyncio.create_task(self._carry_out(mine), name="liveprune-promotion")

    async def stop(self) -> None:
        """Leave a swap to itself, or to the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _now(self) -> float:
        return asyncio.get_running_loop().time() if self._clock is None else self._clock()

    async def _carry_out(self, asked: Sequence[Promotion]) -> None:
        """Swap to the last of the winners."""
        settle = self._store.decisions.settle
        *earlier, last = asked
        try:
            for promotion in earlier:
                await asyncio.to_thread(settle, promotion)
            if await asyncio.to_thread(self._swapped_since, last.asked):
                logger.info("experiment %s: swapped already, or by an operator", last.experiment)
                await asyncio.to_thread(settle, last)
                return
            error = await self._swap(last)
            await asyncio.to_thread(settle, last, error)
        except (
            StoreError
        ) as failure:  # the marker is missing: the next look finds the swap on record
            logger.warning("experiment %s: %s", last.experiment, failure)

    async def _swap(self, promotion: Promotion) -> str:
        """Why it failed; empty if it did not."""
        try:
            operation = await self._control.swap(promotion.variant)
            while not operation.state.ended:
                await asyncio.sleep(self._poll)
                operation = self._control.operation(operation.id) or operation
        except ConflictError as error:  # another operation is under way: soon
            return str(error)
        except LiveprunError as error:
            reason = str(error)
        else:
            if operation.state is State.DONE:
                self._failures, self._not_before = 0, 0.0
                logger.info("experiment %s: %s serves", promotion.experiment, operation.variant)
                return ""
            reason = operation.error or f"the swap was {operation.state}"
        first, longest = BACKOFF
        wait = min(first * 2**self._failures, longest)
        self._failures += 1
        self._not_before = self._now() + wait
        text = "experiment %s: shipped, but the swap to %s failed, next try in %.0f s: %s"
        logger.error(text, promotion.experiment, promotion.variant, wait, reason)
        return reason

    def _swapped_since(self, moment: float) -> bool:
        """Whether this server's alias has moved: by a swap of ours before a crash, or by hand."""
        rows = self._store.swaps.list(limit=100, replica=self._store.replica, state="done")
        return any(x["kind"] in ("swap", "rollback") and x["created"] > moment for x in rows)
