"""What one fill task does in one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from liveprune.patches.neuron_merge import NeuronMerge, write_neurons
from liveprune.patches.row_merge import merge_rows
from liveprune.patches.row_writer import RowWriter
from liveprune.pruning.errors import EngineError

if TYPE_CHECKING:
    from liveprune.patches.row_filler import MergeJob, RowFiller

PIECE_ELEMENTS = 1 << 22
"""Of each merged row, computed in one piece of work: about one expert's worth."""


class Work(NamedTuple):
    """A piece of work for one thread."""

    name: str
    """What it is about, for messages."""
    run: Callable[[RowWriter], int]
    """Does it with the thread's own buffers; returns how many bytes of rows it wrote."""


@dataclass(eq=False)
class LayerFill:
    """The rows of one layer that a task fills, merges or needs."""

    filler: RowFiller
    layer: int
    fills: Mapping[int, int]
    """Row -> expert; those of base experts that have memory already are only verified."""
    merges: Sequence[MergeJob]
    gathers: Sequence[NeuronMerge]
    needed: frozenset[int]
    """Further rows that must have memory and be right."""
    owned: frozenset[int] = frozenset()
    """Rows that the task gave memory to, to be released unless it becomes ready."""
    _missing: dict[int, int] = field(default_factory=dict)
    """Row -> expert: what ``plan`` found to be without memory."""

    @cached_property
    def merged(self) -> frozenset[int]:
        """Rows that merges of both kinds write."""
        mixed = frozenset(row for merge in self.merges for row in merge.rows)
        return mixed.union(*(gather.rows for gather in self.gathers))

    @cached_property
    def wanted(self) -> frozenset[int]:
        """Rows that have memory and are right when the task is ready."""
        return self.merged | self.needed | self.fills.keys()

    @cached_property
    def sources(self) -> frozenset[int]:
        """Base rows that merges read."""
        return frozenset(i for merge in self.merges for i in _used(merge))

    def plan(self) -> int:
        """Find what is missing; returns the bytes to write. Call under the owner's lock.

        Raises:
            EngineError: a spare row is needed that has no memory, or to be written that has.
        """
        rows, experts = self.filler.rows[self.layer], self.filler.reader.experts(self.layer)
        resident = rows.resident
        taken = sorted(x for x in resident & (self.merged | self.fills.keys()) if x >= experts)
        if taken:
            raise EngineError(
                f"layer {self.layer}: rows {taken} are in use, expected free spare rows"
            )
        absent = sorted(self.needed - resident - self.fills.keys() - self.merged)
        if absent:
            raise EngineError(
                f"layer {self.layer}: rows {absent} have no memory, expected rows that were filled"
            )
        every = {**{i: i for i in self.sources}, **self.fills}
        self._missing = {row: every[row] for row in sorted(every.keys() - resident)}
        row_bytes = sum(x[0].numel() * x.element_size() for x in (rows.w13, rows.w2))
        return row_bytes * (len(self._missing) + len(self.merged))

    def commit(self) -> None:
        """Give the missing rows memory."""
        with self.filler.protect():
            # Owned first: a commit that fails half-way is undone, too.
            self.owned = self.merged | self._missing.keys()
            self.filler.rows[self.layer].commit(sorted(self.owned))

    def filling(self) -> list[Work]:
        """Read the missing experts."""
        return [
            Work(f"layer {self.layer}, expert {expert}", partial(self._fill, row, expert))
            for row, expert in self._missing.items()
        ]

    def merging(self) -> list[Work]:
        """Compute merged rows, each piece all rows of a merge for a range of elements.

        A row that is gathered neuron by neuron is one piece.
        """
        rows = self.filler.rows[self.layer]
        work = [
            Work(f"layer {self.layer}, row {row}", partial(self._gather, merge, row))
            for merge in self.gathers
            for row in merge.rows
        ]
        for merge in self.merges:
            used = _used(merge)
            coefficients = torch.from_numpy(merge.coefficients[:, used])
            for tensor in (rows.w13, rows.w2):
                sources = [tensor[i].view(-1) for i in used]
                targets = [tensor[j].view(-1) for j in merge.rows]
                for start in range(0, targets[0].numel(), PIECE_ELEMENTS):
                    part = slice(start, start + PIECE_ELEMENTS)
                    pieces = [x[part] for x in sources], [x[part] for x in targets]
                    run = partial(_merge, coefficients, *pieces)
                    work.append(Work(f"layer {self.layer}, rows {list(merge.rows)}", run))
        return work

    def recording(self) -> list[Work]:
        """Take the checksums of merged rows."""
        return [
            Work(f"layer {self.layer}, row {row}", partial(self._record, row))
            for row in sorted(self.merged)
        ]

    def verifying(self) -> list[Work]:
        """Read every wanted row back."""
        return [
            Work(f"layer {self.layer}, row {row}", partial(self._verify, row))
            for row in sorted(self.wanted)
        ]

    def release_temporary(self) -> None:
        """Take back the memory of sources that only the merges needed.

        Raises:
            EngineError: a source has been released while it was being read.
        """
        rows = self.filler.rows[self.layer]
        with self.filler.protect():
            lost = sorted(self.sources - rows.resident)
            temporary = self.owned - self.wanted
            rows.release(sorted(temporary))
            self.owned -= temporary
        if lost:
            raise EngineError(
                f"layer {self.layer}: rows {lost} were released while they were being merged"
            )

    def undo(self) -> None:
        """Release what the task gave memory to."""
        if not self.owned:
            return
        experts = self.filler.reader.experts(self.layer)
        self.filler.checks.forget(self.layer, (row for row in self.owned if row >= experts))
        with self.filler.protect():
            self.filler.rows[self.layer].release(sorted(self.owned))

    def _fill(self, row: int, expert: int, writer: RowWriter) -> int:
        filler, rows = self.filler, self.filler.rows[self.layer]
        row13, row2 = rows.w13[row], rows.w2[row]
        writer.write(self.layer, expert, filler.packing[self.layer], row13, row2)
        found, first = filler.checks.measure(rows, row), filler.checks.expected(self.layer, row)
        if row == expert and first not in (None, found):
            raise EngineError(
                f"checksum is {found:08x}, expected {first:08x} as when it was first filled; "
                f"its file has changed or is damaged: {filler.reader.where(self.layer, expert)}"
            )
        filler.checks.record(self.layer, row, found)
        return row13.nbytes + row2.nbytes

    def _gather(self, merge: NeuronMerge, row: int, _: RowWriter) -> int:
        filler, rows = self.filler, self.filler.rows[self.layer]
        row13, row2 = rows.w13[row], rows.w2[row]
        write_neurons(merge, row, filler.reader, filler.packing[self.layer], row13, row2)
        return row13.nbytes + row2.nbytes

    def _record(self, row: int, _: RowWriter) -> int:
        checks = self.filler.checks
        checks.record(self.layer, row, checks.measure(self.filler.rows[self.layer], row))
        return 0

    def _verify(self, row: int, _: RowWriter) -> int:
        found = self.filler.checks.measure(self.filler.rows[self.layer], row)
        expected = self.filler.checks.expected(self.layer, row)
        if found != expected:
            written = "nothing, it was never filled" if expected is None else f"{expected:08x}"
            raise EngineError(f"checksum is {found:08x}, expected {written}")
        return 0


def _merge(
    coefficients: torch.Tensor,
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    _: RowWriter,
) -> int:
    merge_rows(coefficients, sources, targets)
    return sum(target.nbytes for target in targets)


def _used(merge: MergeJob) -> list[int]:
    """Experts with a coefficient other than zero."""
    return [int(i) for i in np.flatnonzero(merge.coefficients.any(axis=0))]
