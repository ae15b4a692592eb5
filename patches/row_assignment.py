"""The expert rows that a plan uses: base experts' own rows, and spare rows for merged experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from liveprune.pruning.errors import EngineError
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
    if plan.merge is None:
        return Assignment(plan.kept, (), None)
    sources = [_only_source(row) for row in plan.merge]
    mixed = [j for j, source in enumerate(sources) if source is None]
    if len(mixed) > len(free):
        raise EngineError(
            f"layer {plan.layer}: the plan merges {len(mixed)} experts, found {len(free)} free "
            f"spare rows (--spare-rows)"
        )
    taken = dict(zip(mixed, free, strict=False))
    rows = tuple(taken[j] if source is None else source for j, source in enumerate(sources))
    return Assignment(rows, tuple(taken.values()), plan.merge[mixed] if mixed else None)


def _only_source(row: np.ndarray[tuple[int], np.dtype[np.float32]]) -> int | None:
    """The one expert that ``row`` takes with weight 1; None for a true mixture."""
    used = np.flatnonzero(row)
    return int(used[0]) if len(used) == 1 and row[used[0]] == 1 else None
