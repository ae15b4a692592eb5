"""Rebuild mode: variants for engines that cannot have routing tables.

Where weights are quantised, experts are spread over ranks, drafts are speculated and so on
(``patches.live_support`` says why), a variant is a pruned checkpoint of its own. It is written
beside the running server; serving it takes a restart (``server.rebuild_restart``), so one variant
answers at a time, under the names of the base model. The operations are those of live variants.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

from rich.filesize import decimal

from liveprune.pruning.checkpoint.inspect import Inspection, inspect
from liveprune.pruning.checkpoint.verify import verify_checkpoint
from liveprune.pruning.errors import (
    ConflictError,
    IncompatibleEnvironmentError,
    LiveprunError,
    VariantError,
)
from liveprune.pruning.foreign import read_any_plan
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan_io import load_plan
from liveprune.server.layer_views import LayerView, layer_views
from liveprune.server.operations import Operation, State, Status, VariantView
from liveprune.server.rebuild_checkpoints import RebuiltCheckpoints
from liveprune.server.rebuild_operations import RebuildOperations
from liveprune.server.rebuild_state import Built, RebuildFolder, RebuildState
from liveprune.server.variant import FULL, Variant, check_tag

RETRY_SECONDS = 2.0
"""Between attempts to record that the server answers, on a disk that is full."""

logger = logging.getLogger("liveprune.rebuild")


def stop_this_server() -> None:
    """Have vLLM stop as for an operator: requests under way get its ``--shutdown-timeout``."""
    os.kill(os.getpid(), signal.SIGTERM)


class RebuildControl:
    """Variants that are checkpoints; the ``ControlPlane`` of a server without routing tables."""

    serving = "one variant at a time (rebuild mode)"
    directory = None
    """Requests have no choice of variant."""
    golden_mismatches = 0
    """There is no canary: a new process has read its weights anew."""

    def __init__(
        self,
        folder: RebuildFolder,
        name: str,
        *,
        reason: str,
        answers: Callable[[], Awaitable[bool]],
        stop_server: Callable[[], None] = stop_this_server,
        on_end: Callable[[Operation], None] = lambda _: None,
        poll: float = 0.25,
    ) -> None:
        """Nothing happens before ``start``; all of it in the event loop that calls that.

        Args:
            folder: the one that ``rebuild_restart.restarting`` has.
            name: what clients call the model, whichever variant serves.
            reason: why there can be no live variants, e.g. ``quantised weights (fp8)``.
            answers: asks the public API whether it answers.
            stop_server: begins to stop it, and returns.
            on_end: is told of each operation that has ended.
            poll: seconds between questions to the public API.

        Raises:
            ArchitectureError: Liveprune cannot prune this family.
        """
        self.reason = reason
        self._folder = folder
        self._name = name
        self._answers = answers
        self._stop_server = stop_server
        self._poll = poll
        self._spec = ModelSpec.from_path(folder.base)
        self._full = Built("", *Variant(FULL, None).counts(self._spec), bytes=0)
        self._operations = RebuildOperations(on_end)
        self._checkpoints = RebuiltCheckpoints(folder, self._spec)
        self._served: Inspection | None = None
        self._waiting: asyncio.Task[None] | None = None
        self._settled = False

    @property
    def candidates(self) -> NoReturn:
        """Always refused: a candidate would take a restart.

        Raises:
            IncompatibleEnvironmentError: naming what live variants cannot work with.
        """
        raise IncompatibleEnvironmentError(
            "rebuild mode: plans can be tried out on live variants only, which cannot work with "
            f"{self.reason}"
        )

    async def start(self) -> None:
        """Take over from the process before, and wait for the first answer in the background."""
        state = self._folder.state
        operation = state.last_operation()
        if operation is not None and not operation.state.ended:
            tag = operation.variant.rpartition(":")[2]
            asked = ("rollback",) if operation.kind == "rollback" else (operation.kind, tag)
            self._operations.remember(operation, state.key, asked)
        await asyncio.to_thread(self._checkpoints.tidy)
        tag = state.wanted if state.attempt and state.wanted is not None else state.serving
        try:
            self._served = await asyncio.to_thread(inspect, self._folder.model(tag))
        except LiveprunError as error:
            logger.warning("the sizes of %s are unknown: %s", self._full_name(tag), error)
        self._waiting = asyncio.create_task(self._settle())

    async def stop(self) -> None:
        """Interrupt what is under way; the server is about to end."""
        await self._operations.stop()
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.wait({self._waiting})

    async def add(self, tag: str, plan: Path, *, idempotency_key: str | None = None) -> Operation:
        """Write the checkpoint of a plan, beside the running server; nothing serves it yet.

        Raises:
            PlanError: the plan is unreadable or does not fit the model.
            VariantError: the tag is reserved, malformed, or another plan has it.
            ConflictError: another operation is under way, or the server does not answer yet.
        """
        asked = ("add", tag, str(plan))
        if (earlier := self._accept(idempotency_key, asked)) is not None:
            return earlier
        check_tag(tag)
        recipe = await asyncio.to_thread(read_any_plan, plan, self._spec)
        cost = await asyncio.to_thread(self._checkpoints.cost, recipe)
        if (earlier := self._accept(idempotency_key, asked)) is not None:
            return earlier
        known = self._folder.state.variants.get(tag)
        if known is not None and known.digest != recipe.digest:
            raise VariantError(
                f"{self._full_name(tag)}: has the plan {known.digest}, found {recipe.digest}; "
                "remove it first, or choose another tag"
            )
        operation = self._operation("add", tag)
        operation.notes.append(
            f"the checkpoint takes about {decimal(cost)} on disk; serving "
            "it takes a swap, which restarts the server"
        )

        async def build(operation: Operation) -> None:
            self._operations.enter(operation, State.FILLING)
            await self._checkpoints.build(operation, tag, recipe)

        return self._operations.begin(operation, build, idempotency_key, asked)

    async def remove(self, tag: str, *, idempotency_key: str | None = None) -> Operation:
        """Delete the checkpoint of a variant.

        Raises:
            VariantError: it is unknown, or ``full``.
            ConflictError: it serves, or another operation is under way.
        """
        asked = ("remove", tag)
        if (earlier := self._accept(idempotency_key, asked)) is not None:
            return earlier
        self._folder.model(tag)
        name = self._full_name(tag)
        if tag == FULL:
            raise VariantError(f"{name}: is the base model, which is never removed")
        if tag == self._folder.state.serving:
            raise ConflictError(f"{name}: serves {self._name!r}; swap to another variant first")

        async def delete(operation: Operation) -> None:
            self._operations.enter(operation, State.RELEASING)
            await self._checkpoints.delete(operation, tag)

        return self._operations.begin(
            self._operation("remove", tag), delete, idempotency_key, asked
        )

    async def swap(
        self,
        tag: str,
        *,
        keep_previous: bool = False,  # noqa: ARG002 - its checkpoint always stays
        idempotency_key: str | None = None,
    ) -> Operation:
        """Restart the server with the checkpoint of a variant.

        Raises:
            VariantError: it is unknown.
            ConflictError: another operation is under way, or the server does not answer yet.
        """
        asked = ("swap", tag)
        if (earlier := self._accept(idempotency_key, asked)) is not None:
            return earlier
        return self._switch("swap", tag, idempotency_key, asked)

    async def rollback(self, *, idempotency_key: str | None = None) -> Operation:
        """Restart the server with what it served before.

        Raises:
            ConflictError: there was nothing before, or see ``swap``.
        """
        asked = ("rollback",)
        if (earlier := self._accept(idempotency_key, asked)) is not None:
            return earlier
        previous = self._folder.state.previous
        if previous is None:
            raise ConflictError(f"{self._name}: found no swap to roll back")
        return self._switch("rollback", previous, idempotency_key, asked)

    async def cancel(self, operation_id: str) -> Operation:
        """Give up an operation that has not begun to restart the server.

        Raises:
            VariantError: it is unknown.
            ConflictError: it has ended, or it is too late.
        """
        return await self._operations.cancel(operation_id)

    async def variants(self) -> list[VariantView]:
        """All variants, ``full`` included, by name."""
        known = {FULL: self._full, **self._folder.state.variants, **self._checkpoints.building}
        return [self._view(tag, known[tag]) for tag in sorted(known)]

    async def layers(self, tag: str) -> tuple[LayerView, ...]:
        """What a variant leaves of each layer.

        Raises:
            VariantError: it is unknown.
            PlanError: the plan beside its checkpoint cannot be read.
        """
        model = self._folder.model(tag)
        plan = None if tag == FULL else await asyncio.to_thread(load_plan, model)
        return await asyncio.to_thread(layer_views, plan, self._spec)

    async def status(self) -> Status:
        """What serves and what is going on; sizes are those of the files, others are not known."""
        state, served = self._folder.state, self._served
        experts = (served.expert_bytes or 0) if served else 0
        total = (served.total_bytes or 0) if served else 0
        return Status(
            model=self._name,
            alias=self._full_name(state.serving),
            previous=None if state.previous is None else self._full_name(state.previous),
            ready=await self._is_ready(),
            operation=self._operations.current,
            expert_bytes=experts,
            spare_bytes=0,
            other_weight_bytes=total - experts,
            kv_bytes=0,
            kv_blocks=0,
            kv_max_blocks=0,
            process_bytes=0,
            memory_target_bytes=None,
            fingerprint="",
            variants=tuple(await self.variants()),
        )

    def operation(self, operation_id: str) -> Operation | None:
        """One operation, also some time after its end."""
        return self._operations.operation(operation_id)

    def operations(self) -> list[Operation]:
        """The newest first; of those before a restart, the swap that it was for."""
        return self._operations.operations()

    def _accept(self, key: str | None, asked: tuple[str, ...]) -> Operation | None:
        """The operation that ``key`` began, or None if another may begin now."""
        if (earlier := self._operations.earlier(key, asked)) is not None:
            return earlier
        self._operations.check_free()
        if not self._settled:
            raise ConflictError("the server does not answer requests yet; try again soon")
        return None

    def _switch(self, kind: str, tag: str, key: str | None, asked: tuple[str, ...]) -> Operation:
        model, state = self._folder.model(tag), self._folder.state
        operation = self._operation(kind, tag)

        async def nothing(_: Operation) -> None:
            """It serves already."""

        async def restart(operation: Operation) -> None:
            if tag != FULL:
                await asyncio.to_thread(verify_checkpoint, model)
            self._operations.enter(operation, State.SWITCHING)
            await asyncio.to_thread(
                self._folder.update, lambda now: now.switching(tag, operation, key)
            )
            try:
                self._stop_server()
            except BaseException:
                self._folder.update(RebuildState.staying)
                raise

        if tag == state.serving:
            return self._operations.begin(operation, nothing, key, asked)
        operation.notes.append(
            "the server restarts and answers no requests until it is up again (its last start "
            f"took {state.start_seconds:.0f} s); those under way get vLLM's --shutdown-timeout "
            "(0 s by default) to end, then they are aborted"
        )
        return self._operations.begin(operation, restart, key, asked)

    async def _is_ready(self) -> bool:
        current = self._operations.current
        stopping = self._settled and current is not None and current.state is State.SWITCHING
        return self._folder.answering.is_set() and not stopping and await self._answers()

    async def _settle(self) -> None:
        """Wait until the public API answers; only then is what this process serves settled."""
        while not await self._answers():  # noqa: ASYNC110 - another program's event
            await asyncio.sleep(self._poll)
        self._folder.answering.set()
        seconds = time.monotonic() - self._folder.opened
        while True:
            try:
                state = await asyncio.to_thread(
                    self._folder.update, lambda now: now.answered(seconds)
                )
            except OSError:
                logger.exception("%s: not written, tried again", self._folder.state_file)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self._operations.settle(state.last_operation())
                self._settled = True
                return

    def _operation(self, kind: str, tag: str) -> Operation:
        notes = [f"rebuild mode: live variants cannot work with {self.reason}"]
        return Operation(kind, self._full_name(tag), notes=notes)

    def _full_name(self, tag: str) -> str:
        return f"{self._name}:{tag}"

    def _view(self, tag: str, built: Built) -> VariantView:
        state, serves = self._folder.state, tag == self._folder.state.serving
        shown = "preparing" if tag in self._checkpoints.building else "standby"
        if serves:
            shown = "live" if state.wanted is None else "draining"
        experts = self._served.expert_bytes if self._served and serves else None
        return VariantView(
            name=self._full_name(tag),
            tag=tag,
            digest=built.digest or None,
            state=shown,
            is_alias=serves,
            is_previous=tag == state.previous,
            experts=built.experts,
            top_k=built.top_k,
            row_bytes=experts or 0,
            in_flight=0,
        )
