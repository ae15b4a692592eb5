"""After a restart: know the variants again, make live what was live, route as before."""

from __future__ import annotations

import asyncio

from liveprune.pruning.errors import PlanError
from liveprune.pruning.plan_guards import check_plan
from liveprune.server.change import Change
from liveprune.server.operation_runner import OperationRunner
from liveprune.server.registry import Registry
from liveprune.server.state_folder import SavedState, StateFolder
from liveprune.server.swap import bring
from liveprune.server.variant import Variant


async def read_variants(folder: StateFolder, registry: Registry) -> list[str]:
    """Read the plans of the saved variants; returns which cannot be read or do not fit."""
    problems = []
    for tag, digest in folder.state.variants.items():
        try:
            plan = await asyncio.to_thread(folder.load_plan, digest)
            check_plan(plan, registry.spec)
        except PlanError as error:
            problems.append(f"{registry.full_name(tag)}: {error}; add it again")
            registry.unreadable[tag] = digest
        else:
            registry.known[tag] = Variant(tag, plan)
    return problems


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
