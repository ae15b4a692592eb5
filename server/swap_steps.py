"""What happens in each state of a swap, and how it is undone.

Each step is a coroutine that changes engine, registry and state folder a little; ``server.swap``
says in which order they run, how long each may take, and when their undoing runs. An undoing asks
the engine what is true rather than trusting how far its step came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from liveprune.patches.live_types import KVStatus
from liveprune.pruning.errors import EngineError, StoreError
from liveprune.pruning.plan_io import save_plan
from liveprune.server.change import Change
from liveprune.server.engine import LiveEngine
from liveprune.server.golden import Canaries, compare, flaw, read_golden, write_golden
from liveprune.server.memory_budget import kv_blocks, room_for_rows, row_bytes, rows_to_fill
from liveprune.server.registry import Phase, Publication, Registry
from liveprune.server.state_folder import SavedState, StateFolder

T = TypeVar("T")


class Steps:
    """The steps, over one engine, registry and state folder."""

    def __init__(
        self,
        engine: LiveEngine,
        registry: Registry,
        folder: StateFolder,
        canaries: Canaries,
        *,
        poll: float,
        grace: float,
    ) -> None:
        """``poll``: seconds between looks; ``grace``: for an interrupted engine call to end."""
        self.engine = engine
        self.registry = registry
        self.folder = folder
        self.canaries = canaries
        self.memory_target = 0
        """Bytes; set when the engine is up."""
        self.restoring = False
        """Leave the saved state alone: it says what is to be restored."""
        self.golden_mismatches = 0
        self._poll = poll
        self._grace = grace

    async def store(self, change: Change) -> None:
        """Write the plan where the workers can read it."""
        plan = change.variant.plan
        if plan is not None and change.candidate:
            path = self.folder.candidate_path(plan.digest)
            await self._settled(asyncio.to_thread(save_plan, plan, path))
        elif plan is not None:
            await self._settled(asyncio.to_thread(self.folder.store_plan, plan))

    async def make_room(self, change: Change) -> None:
        """Get a slot, and shrink the KV cache by what the rows that are missing will take."""
        await self._clear_leftovers()
        await self._release()
        change.new = self.registry.claim(change.variant, candidate=change.candidate)
        spec = self.registry.spec
        held = [p for p in self.registry.publications if p.phase in (Phase.LIVE, Phase.DRAINING)]
        plans = [p.variant.plan for p in held]
        # In a thread: many large merges take a while, and this one streams tokens.
        rows = await asyncio.to_thread(rows_to_fill, change.variant.plan, plans, spec)
        memory, kv = await self.engine.memory(), await self.engine.kv()
        needed = rows * row_bytes(memory, spec)
        await self._resize_kv(kv, room_for_rows(memory, kv, self.memory_target, needed))

    async def give_room_back(self, _: Change | None = None) -> None:
        """Release what was filled, and let the KV cache have the bytes again."""
        await self._release()
        await self.fit_kv()

    async def fill(self, change: Change) -> None:
        """Have the missing rows read, merged and verified."""
        slot, digest = change.coming.served.slot, change.variant.digest
        where = self.folder.candidate_path if change.candidate else self.folder.store.plans.path
        plan = None if digest is None else where(digest)
        await self._settled(self.engine.prepare(slot, plan))
        while True:
            progress = await self.engine.progress(slot)
            change.operation.bytes_done = progress.bytes_done
            change.operation.bytes_total = progress.bytes_total
            if progress.phase == "ready":
                return
            if progress.phase in ("failed", "cancelled"):
                raise EngineError(
                    f"filling {progress.phase}: {progress.error or 'no reason given'}"
                )
            await asyncio.sleep(self._poll)

    async def stop_filling(self, change: Change) -> None:
        """Give the slot up; does nothing to one that is free."""
        if change.new is not None:
            await self._settled(self.engine.cancel(change.new.served.slot))

    async def publish(self, change: Change) -> None:
        """Make the routing tables live; no name leads to them yet."""
        await self._settled(self.engine.publish(change.coming.served.slot))

    async def unpublish(self, change: Change) -> None:
        """Take the tables out, if they ever became live."""
        slot = change.coming.served.slot
        if slot in (await self.engine.memory()).slots:
            await self._until(lambda: self._retire(slot))  # canary prompts may still run

    async def canary(self, change: Change) -> None:
        """Ask for golden answers; the first ones ever are recorded."""
        reason = await self.golden_difference(change.coming, change.operation.notes)
        if reason is not None:
            raise EngineError(f"{change.coming.served.name}: golden answers differ: {reason}")

    async def canary_compacted(self, change: Change) -> None:
        """Ask again, now that rows are gone; a difference is for ``server.swap`` to act on."""
        change.mismatch = await self.golden_difference(change.coming, change.operation.notes)

    async def switch(self, change: Change) -> None:
        """Move the names: the saved state first, then, in one go, what requests see."""

        async def commit() -> None:
            new, now = change.coming, self.registry.saved()
            variants, tag = dict(now.variants), new.variant.tag
            if new.variant.digest is not None:
                variants[tag] = new.variant.digest
            live = tuple(dict.fromkeys((*now.live, tag)))
            moved = replace(now, alias=change.alias, previous=change.previous)
            await self._save(replace(moved, variants=variants, live=live))
            self.registry.go_live(new)
            self.registry.alias, self.registry.previous = change.alias, change.previous
            change.commit()

        await self._settled(commit())

    async def save_again(self, change: Change) -> None:
        """Save the state as things are, in case a failed step wrote it before it failed."""
        try:
            await self._settled(self._save(self.registry.saved()))
        except StoreError as error:
            change.operation.notes.append(f"the state could not be saved again: {error}")

    async def drain(self, change: Change) -> None:
        """Wait until nothing uses the old variant, and take it out of the engine."""
        old = change.going
        self.registry.start_draining(old)
        while self.registry.in_flight(old):  # noqa: ASYNC110 - counts raise no event
            await asyncio.sleep(self._poll)
        # Before the engine is touched: a full disk must not leave it half done.
        await self._settled(self._save(self.registry.saved()))

        async def commit() -> bool:
            if not await self._retire(old.served.slot):
                return False
            self.registry.drop(old)
            change.commit()
            return True

        await self._until(commit)

    async def stop_draining(self, change: Change) -> None:
        """Let requests have the old variant again, unless the engine has let go of it."""
        old = change.going
        self.registry.stop_draining(old)
        if old.served.slot not in (await self.engine.memory()).slots:
            self.registry.drop(old)
            change.committed = True
        await self.save_again(change)

    async def release(self, change: Change) -> None:
        """Give back the rows that nothing needs any more."""
        await self._clear_leftovers()
        change.operation.freed_bytes += await self._release()

    async def grow(self, _: Change) -> None:
        """Give the KV cache the freed bytes."""
        await self.fit_kv()

    async def fit_kv(self) -> None:
        """Make the KV cache as large as the target allows now."""
        memory, kv = await self.engine.memory(), await self.engine.kv()
        await self._resize_kv(kv, kv_blocks(memory, kv, self.memory_target))

    async def forget(self, change: Change) -> None:
        """No longer know a variant that is not live."""

        async def commit() -> None:
            tag, now = change.variant.tag, self.registry.saved()
            variants = {other: x for other, x in now.variants.items() if other != tag}
            previous = None if now.previous == tag else now.previous
            await self._save(replace(now, variants=variants, previous=previous))
            self.registry.forget(tag)
            change.commit()

        await self._settled(commit())

    async def tidy(self, change: Change) -> None:
        """Delete the files of plans that no variant has, or has any more."""
        if change.candidate and change.variant.plan is not None:
            path = self.folder.candidate_path(change.variant.plan.digest)
            for file in (path, path.with_suffix(".safetensors")):
                file.unlink(missing_ok=True)
            return
        for digest in (change.variant.digest, change.replaced):
            if digest is not None:
                await asyncio.to_thread(self.folder.discard, digest)

    async def golden_difference(self, publication: Publication, notes: list[str]) -> str | None:
        """How the answers differ from the golden ones; None if equal, or recorded just now."""
        served, canaries = publication.served, self.canaries
        path = self.folder.golden_path(publication.variant.digest, canaries.key)
        found = await self.engine.golden(served, canaries.prompts, canaries.tokens)
        reason = flaw(found, len(canaries.prompts))
        if reason is None:
            expected = await asyncio.to_thread(read_golden, path)
            if expected is None:
                await self._settled(asyncio.to_thread(write_golden, path, found))
                notes.append(f"{served.name}: no golden answers yet: recorded")
            else:
                reason = compare(expected, found, canaries.tolerance)
        self.golden_mismatches += reason is not None
        return reason

    async def _clear_leftovers(self) -> None:
        """Try again to take out what an earlier operation could not."""
        for publication in [p for p in self.registry.publications if p.phase is Phase.LEFTOVER]:
            slot = publication.served.slot
            try:
                if slot not in (await self.engine.memory()).slots:
                    await self._settled(self.engine.cancel(slot))
                    gone = True
                else:
                    idle = not self.registry.in_flight(publication)
                    gone = idle and await self._settled(self._retire(slot))
            except EngineError:
                continue  # it keeps its slot; this operation may not need it
            if gone:
                self.registry.drop(publication)

    async def _until(self, attempt: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        """Try until it works, e.g. because the engine has no more requests for a slot."""
        while True:
            if await self._settled(attempt()):
                return
            await asyncio.sleep(self._poll)

    async def _retire(self, slot: int) -> bool:
        """Retire a slot if no request uses it. Not to be interrupted."""
        try:
            return await self.engine.retire(slot)
        except EngineError:
            if slot in (await self.engine.memory()).slots:
                raise
            return True  # it failed after it was done

    async def _release(self) -> int:
        total = 0
        while freed := await self._settled(self.engine.release()):
            total += freed
        return total

    async def _resize_kv(self, kv: KVStatus, blocks: int) -> None:
        if kv.blocks != blocks:
            kv = await self._settled(self.engine.resize_kv(blocks))
        while kv.blocks > blocks:  # blocks in use come free as their requests end
            await asyncio.sleep(self._poll)
            kv = await self._settled(self.engine.resize_kv(blocks))

    async def _save(self, state: SavedState) -> None:
        if not self.restoring:
            await asyncio.to_thread(self.folder.save, state)

    async def _settled(self, call: Coroutine[Any, Any, T]) -> T:
        """Await a call that changes something; when interrupted, let it end first.

        So an undoing seldom meets a change that is still on its way.
        """
        task = asyncio.ensure_future(call)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait({task}, timeout=self._grace)
            if not task.cancel() and not task.cancelled():
                task.exception()  # seen here, so that asyncio does not report it as lost
            raise
