"""After a restart: know the variants again, make live what was live, route as before."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from liveprune.pruning.errors import PlanError
from liveprune.pruning.plan_guards import check_plan
from liveprune.server.change import Change
from liveprune.server.operation_runner import OperationRunner
from liveprune.server.registry import Registry
from liveprune.server.state_folder import SavedState, StateFolder
from liveprune.server.swap import bring
from liveprune.server.variant import FULL, Variant

logger = logging.getLogger("liveprune")


async def read_variants(folder: StateFolder, registry: Registry) -> list[str]:
    """Read the plans of the saved variants; returns which cannot be read or do not fit."""
    read, problems = await asyncio.to_thread(_read, folder, registry, folder.state.variants)
    _learn(registry, read, folder.state.variants)
    return problems


async def look_again(folder: StateFolder, registry: Registry, runner: OperationRunner) -> None:
    """Know what other replicas and jobs have published since, and forget what is gone.

    What is live here stays as it is; nothing changes while an operation is under way.
    """
    if runner.busy:
        return
    variants = await asyncio.to_thread(folder.refresh)
    read, problems = await asyncio.to_thread(_read, folder, registry, variants)
    if runner.current is not None:  # begun meanwhile
        return
    for problem in problems:
        logger.warning("%s", problem)
    _learn(registry, read, variants)
    held = {FULL, registry.alias, registry.previous, *registry.live}
    for tag in registry.known.keys() - variants.keys() - held:
        registry.forget(tag)


def _read(
    folder: StateFolder, registry: Registry, variants: Mapping[str, str]
) -> tuple[dict[str, Variant], list[str]]:
    """Variants that are not known so yet, and what is wrong with the others."""
    read, problems = {}, []
    for tag, digest in variants.items():
        known = registry.known.get(tag)
        if registry.unreadable.get(tag) == digest or (known and known.digest == digest):
            continue
        try:
            plan = folder.store.plans.load(digest)
            check_plan(plan, registry.spec)
        except PlanError as error:
            problems.append(f"{registry.full_name(tag)}: {error}; add it again")
        else:
            read[tag] = Variant(tag, plan)
    return read, problems


def _learn(registry: Registry, read: Mapping[str, Variant], variants: Mapping[str, str]) -> None:
    for tag, digest in variants.items():
        if tag in read and tag not in registry.live:
            registry.known[tag] = read[tag]
        elif tag not in registry.known:
            registry.unreadable[tag] = digest


async def restore(saved: SavedState, registry: Registry, runner: OperationRunner) -> list[str]:
    """Go from the one variant that the engine came up with to what was saved.

    The alias target comes first, so that the bare name serves it soonest; what the engine came up
    with goes if it was not live before.

    Returns:
        What could not be made live; the rest is.
    """
    problems = []
    resident = registry.alias
    for tag in dict.fromkeys((saved.alias, *saved.live)):
        if runner.stopped:
            break
        variant = registry.known.get(tag)
        if variant is None or tag in registry.live:
            continue  # reported by read_variants, or nothing to do
        change = Change.asked("swap" if tag == saved.alias else "add", variant, registry)
        if tag == saved.alias:
            change.alias = tag
            if resident not in saved.live:
                change.old = registry.live[resident]
        operation = runner.begin(change, bring(change))
        await runner.idle()
        if operation.error:
            problems.append(operation.error)
    registry.previous = saved.previous if saved.previous in registry.known else None
    return problems
