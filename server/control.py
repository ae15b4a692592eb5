"""The control plane of live variants: what the admin API talks to.

Requests are checked at once; what they start runs in the background as an operation, one at a
time. See ``server.swap`` for what an operation goes through.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from liveprune.patches.live_types import BASE_SLOT
from liveprune.pruning.errors import ConflictError, EngineError, StoreError, VariantError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.server.candidates import LiveCandidates
from liveprune.server.change import Change
from liveprune.server.engine import LiveEngine
from liveprune.server.golden import Canaries
from liveprune.server.layer_views import LayerView, layer_views
from liveprune.server.memory_budget import room_for_rows, total_bytes
from liveprune.server.operation_records import OperationRecords
from liveprune.server.operation_runner import Asked, OperationRunner
from liveprune.server.operations import Operation, State, Status, VariantView
from liveprune.server.registry import Registry
from liveprune.server.restore import look_again, read_variants, restore
from liveprune.server.state_folder import StateFolder
from liveprune.server.swap import LIMITS, Swapper, bring, take_out, tidy_up
from liveprune.server.swap_steps import Steps
from liveprune.server.variant import FULL, check_tag, read_variant

logger = logging.getLogger("liveprune")


class Control:
    """Variants of one engine: which are live, and what the bare name serves."""

    def __init__(
        self,
        model_name: str,
        aliases: Sequence[str],
        base: Path,
        engine: LiveEngine,
        folder: StateFolder,
        canaries: Canaries,
        *,
        memory_target: int | None = None,
        limits: Mapping[State, float] = LIMITS,
        fingerprint: str = "",
        needed: Callable[[], Mapping[str, str]] = dict,
        poll: float = 0.05,
        grace: float = 10.0,
    ) -> None:
        """Nothing happens before ``start``.

        Args:
            model_name: what clients call the model; variants are ``model_name:tag``.
            aliases: further names that the engine serves it under.
            base: the checkpoint's folder.
            engine: the running engine.
            folder: the opened state folder; ``stop`` closes it.
            canaries: the prompts of the golden answers.
            memory_target: bytes for experts, other weights and KV; None: what is used at start.
            limits: seconds that each state may take.
            fingerprint: of the base model, for those who make plans for it.
            needed: tag to the running experiment that needs this variant to be live.
            poll: seconds between looks at a filling or draining slot.
            grace: seconds that an interrupted engine call may take to end.
        """
        self._spec = ModelSpec.from_path(base)
        self._engine = engine
        self._folder = folder
        self._registry = Registry(model_name, aliases, self._spec, engine.slots)
        self._steps = Steps(engine, self._registry, folder, canaries, poll=poll, grace=grace)
        swapper = Swapper(self._steps, limits)
        self._records = OperationRecords(folder.store)
        self._runner = OperationRunner(swapper, self._records)
        self._candidates = LiveCandidates(self._steps, swapper, self._runner)
        self._fingerprint = fingerprint
        self._needed = needed
        self._asked_target = memory_target
        self._started = False

    @property
    def directory(self) -> Registry:
        """What requests ask for their variant."""
        return self._registry

    @property
    def candidates(self) -> LiveCandidates:
        """Plans that are tried out; ConflictError before all is restored."""
        self._check_started()
        return self._candidates

    @property
    def serving(self) -> str:
        """What answers, in a few words."""
        live = ", ".join(sorted(p.served.name for p in self._registry.live.values()))
        return (
            f"{live}; {self._registry.name!r} is {self._registry.full_name(self._registry.alias)}"
        )

    @property
    def golden_mismatches(self) -> int:
        """Times that golden answers differed, for metrics."""
        return self._steps.golden_mismatches

    @property
    def outcomes(self) -> Counter[tuple[str, str]]:
        """Ended operations by kind and final state, for metrics."""
        return self._runner.outcomes

    async def start(self, resident: str | None = None) -> list[str]:
        """Take over an engine that has just come up, and restore what the state folder says.

        Args:
            resident: tag of the variant that the engine came up with; None: the base model.

        Returns:
            What could not be restored, one line each; the server serves all the same.

        Raises:
            VariantError: ``resident`` is not a readable variant of the state folder.
            EngineError: the engine failed or came up with something else, or the memory target is
                too small for what it came up with.
        """
        saved, registry = self._folder.state, self._registry
        problems = await read_variants(self._folder, registry)
        variant = registry.known.get(resident or FULL)
        if variant is None:
            found = "; ".join(problems) or f"found {sorted(registry.known)}"
            raise VariantError(f"{self._folder.path}: expected the variant {resident!r}; {found}")
        memory, kv = await self._engine.memory(), await self._engine.kv()
        live = sorted(memory.slots)
        if len(live) != 1 or (live[0] == BASE_SLOT) != (variant.plan is None):
            expected = "slot 0" if variant.plan is None else "another slot than 0"
            raise EngineError(
                f"engine: found the slots {live} live, expected {expected} for {variant.tag!r}"
            )
        target = self._asked_target
        self._steps.memory_target = total_bytes(memory, kv) if target is None else target
        room_for_rows(memory, kv, self._steps.memory_target, 0)
        await self._steps.fit_kv()
        registry.published = saved.published
        publication = registry.adopt(variant, live[0])
        reason = await self._steps.golden_difference(publication, [])
        if reason is not None:
            problems.append(
                f"{publication.served.name}: serves all the same, though its golden answers differ "
                f"from those on record: {reason}"
            )
        self._steps.restoring = True
        problems += await restore(saved, registry, self._runner)
        self._steps.restoring = False
        self._started = True
        # Else the next start tries again, unless an operator changes something before.
        if not problems and not self._runner.stopped:
            await asyncio.to_thread(self._folder.save, registry.saved())
        return problems

    async def stop(self, seconds: float = 30.0) -> None:
        """Interrupt what is under way, give its undoing some seconds, close the folder."""
        await self._runner.stop(seconds)
        await self._records.written()
        self._folder.close()

    async def variants(self) -> list[VariantView]:
        """Every variant there is, by name."""
        await self._look_again()
        return list(self._registry.views((await self._engine.memory()).slots))

    async def layers(self, tag: str) -> tuple[LayerView, ...]:
        """What a variant leaves of each layer; VariantError if it is unknown."""
        plan = self._registry.variant(tag).plan
        # In a thread: of merges of many neurons it takes a while.
        return await asyncio.to_thread(layer_views, plan, self._spec)

    async def status(self) -> Status:
        """What serves, what is under way, and the memory that it takes."""
        await self._look_again()
        registry = self._registry
        memory, kv = await self._engine.memory(), await self._engine.kv()
        previous = registry.previous
        return Status(
            model=registry.name,
            alias=registry.full_name(registry.alias),
            previous=None if previous is None else registry.full_name(previous),
            ready=bool(registry.live),
            operation=self._runner.current,
            expert_bytes=memory.base_rows,
            spare_bytes=memory.spare_rows,
            other_weight_bytes=memory.other_weights,
            kv_bytes=kv.blocks * kv.block_bytes,
            kv_blocks=kv.blocks,
            kv_max_blocks=kv.max_blocks,
            process_bytes=memory.process,
            memory_target_bytes=self._steps.memory_target or None,
            fingerprint=self._fingerprint,
            variants=registry.views(memory.slots),
        )

    async def add(
        self, tag: str, plan_path: Path | None = None, idempotency_key: str | None = None
    ) -> Operation:
        """Make a variant live: a new one, a known one, or a tag under another plan.

        Args:
            tag: its tag.
            plan_path: a plan in any form; None: the plan that the tag has (``full`` has none).
            idempotency_key: the same one returns the same operation.

        Raises:
            PlanError: the plan is unreadable or does not fit the model.
            VariantError: the tag is reserved, malformed, or unknown and without a plan.
            ConflictError: another operation is under way, or a running experiment needs the plan
                that the tag has.
        """
        asked = ("add", tag, str(plan_path))
        if (earlier := await self._accept(idempotency_key, asked)) is not None:
            return earlier
        registry = self._registry
        if plan_path is None:
            variant = registry.variant(tag)
        else:
            check_tag(tag)
            # In a thread: it may be a long file, and tokens are streamed from this one.
            variant = await asyncio.to_thread(read_variant, tag, plan_path, self._spec)
            await self._runner.make_way()
        change = Change.asked("add", variant, registry)
        change.old = registry.live.get(tag)
        if change.old is not None and change.old.variant.digest == variant.digest:
            return self._runner.begin(change, tidy_up(registry), idempotency_key, asked)
        self._check_not_needed(tag)
        known = registry.known.get(tag)
        if known is not None and known.digest != variant.digest:
            change.replaced = known.digest
        return self._runner.begin(change, bring(change), idempotency_key, asked)

    async def remove(
        self, tag: str, forget: bool = False, idempotency_key: str | None = None
    ) -> Operation:
        """Make a variant no longer live; one that is not live is forgotten.

        Args:
            tag: its tag.
            forget: delete its plan at once, and know it no longer.
            idempotency_key: the same one returns the same operation.

        Raises:
            VariantError: it is unknown, or ``full`` is to be forgotten.
            ConflictError: the bare name routes to it, a running experiment needs it, or another
                operation is under way.
        """
        asked = ("remove", tag, forget)
        if (earlier := await self._accept(idempotency_key, asked)) is not None:
            return earlier
        registry = self._registry
        variant = registry.variant(tag)
        name = registry.full_name(tag)
        if forget and variant.plan is None:
            raise VariantError(f"{name}: is the base model, which is never forgotten")
        if tag == registry.alias:
            raise ConflictError(
                f"{name}: is what {registry.name!r} routes to; swap to another variant first"
            )
        self._check_not_needed(tag)
        change = Change.asked("remove", variant, registry)
        change.old = registry.live.get(tag)
        forget = forget or (change.old is None and variant.plan is not None)
        table = take_out(change, forget=forget) or tidy_up(registry)
        return self._runner.begin(change, table, idempotency_key, asked)

    async def swap(
        self, tag: str, keep_previous: bool = False, idempotency_key: str | None = None
    ) -> Operation:
        """Route the bare name to a variant, made live first if it is not.

        Args:
            tag: of a known variant.
            keep_previous: leave the variant before it live, so that a roll-back takes no time;
                else its memory goes to the KV cache, unless a running experiment needs it.
            idempotency_key: the same one returns the same operation.

        Raises:
            VariantError: the variant is unknown.
            ConflictError: another operation is under way.
        """
        asked = ("swap", tag, keep_previous)
        if (earlier := await self._accept(idempotency_key, asked)) is not None:
            return earlier
        return self._swap("swap", tag, keep_previous, idempotency_key, asked)

    async def rollback(
        self, keep_previous: bool = False, idempotency_key: str | None = None
    ) -> Operation:
        """Swap back to what the bare name routed to before.

        Raises:
            ConflictError: nothing was before, or another operation is under way.
        """
        asked = ("rollback", keep_previous)
        if (earlier := await self._accept(idempotency_key, asked)) is not None:
            return earlier
        tag = self._registry.previous
        if tag is None:
            raise ConflictError(f"{self._registry.name}: found no swap to roll back")
        return self._swap("rollback", tag, keep_previous, idempotency_key, asked)

    def operation(self, operation_id: str) -> Operation:
        """One operation; VariantError if it is unknown, or ended long ago."""
        return self._runner.operation(operation_id)

    def operations(self) -> list[Operation]:
        """The newest first."""
        return self._runner.operations()

    async def cancel(self, operation_id: str) -> Operation:
        """Have an operation undone; see ``OperationRunner.cancel`` for its refusals."""
        return self._runner.cancel(operation_id)

    async def _accept(self, key: str | None, asked: Asked) -> Operation | None:
        """The operation that ``key`` began, or None if another may begin now."""
        if (earlier := self._runner.earlier(key, asked)) is not None:
            return earlier
        self._check_started()
        await self._look_again()
        await self._runner.make_way()
        if (earlier := self._runner.earlier(key, asked)) is not None:  # begun meanwhile
            return earlier
        self._runner.check_free()
        return None

    async def _look_again(self) -> None:
        """Know what others have published; a database that fails changes nothing."""
        if self._started:
            try:
                await look_again(self._folder, self._registry, self._runner)
            except StoreError as error:
                logger.warning("variants of other replicas and jobs are not seen: %s", error)

    def _check_started(self) -> None:
        if not self._started:
            raise ConflictError("the server is restoring its variants; try again soon")

    def _check_not_needed(self, tag: str) -> None:
        holder = self._needed().get(tag)
        if holder is not None and tag in self._registry.live:
            raise ConflictError(
                f"{self._registry.full_name(tag)}: the running experiment {holder} needs it; stop "
                "that first"
            )

    def _swap(
        self, kind: str, tag: str, keep_previous: bool, key: str | None, asked: Asked
    ) -> Operation:
        registry = self._registry
        change = Change.asked(kind, registry.variant(tag), registry)
        change.alias, change.previous = tag, registry.alias
        change.new = registry.live.get(tag)
        if tag == registry.alias and change.new is not None:
            return self._runner.begin(change, tidy_up(registry), key, asked)
        if not keep_previous and registry.alias not in self._needed():
            change.old = registry.live.get(registry.alias)
        return self._runner.begin(change, bring(change), key, asked)
