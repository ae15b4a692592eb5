"""The expert rows that a plan uses: base experts' own rows, and spare rows for merged experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from liveprune.patches.neuron_merge import NeuronMerge
from liveprune.pruning.errors import EngineError
from liveprune.pruning.neuron_sources import only_source
from liveprune.pruning.plan import LayerPlan, Matrix


@dataclass(frozen=True, eq=False)
class Assignment:
    """Rows of one layer for one slot."""

    rows: tuple[int, ...]
    """Row of each new expert, in the plan's order."""
    merged: tuple[int, ...]
    """The spare rows among them."""
    coefficients: Matrix | None
    """[merged, experts] float32: what each spare row is the sum of."""
    neurons: NeuronMerge | None = None
    """What the spare rows are gathered from, where the plan has a neuron map."""

    @property
    def needed(self) -> frozenset[int]:
        return frozenset(self.rows)


def assign_rows(plan: LayerPlan | None, experts: int, free: Sequence[int]) -> Assignment:
    """Choose rows for one layer of a plan (None: the base model).

    A merged expert that is one base expert unchanged takes that expert's row, no spare one.

    Args:
        plan: the layer's plan.
        experts: base experts of the layer; their rows are 0 to ``experts - 1``.
        free: spare rows that nothing uses.

    Raises:
        EngineError: the plan merges more experts than there are free spare rows.
    """
    if plan is None:
        return Assignment(tuple(range(experts)), (), None)
    if plan.neuron_map is not None:
        sources = [only_source(plan, j) for j in range(plan.kept_experts)]
    elif plan.merge is not None:
        sources = [_only_source(row) for row in plan.merge]
    else:
        return Assignment(plan.kept, (), None)
    mixed = [j for j, source in enumerate(sources) if source is None]
    if len(mixed) > len(free):
        raise EngineError(
            f"layer {plan.layer}: the plan merges {len(mixed)} experts, found {len(free)} free "
            f"spare rows (--spare-rows)"
        )
    taken = dict(zip(mixed, free, strict=False))
    rows = tuple(taken[j] if source is None else source for j, source in enumerate(sources))
    spare = tuple(taken.values())
    if plan.merge is None:
        gathered = NeuronMerge(plan, spare, tuple(mixed)) if mixed else None
        return Assignment(rows, spare, None, gathered)
    return Assignment(rows, spare, plan.merge[mixed] if mixed else None)


def _only_source(row: np.ndarray[tuple[int], np.dtype[np.float32]]) -> int | None:
    """The one expert that ``row`` takes with weight 1; None for a true mixture."""
    used = np.flatnonzero(row)
    return int(used[0]) if len(used) == 1 and row[used[0]] == 1 else None
