"""Fill expert rows in the background: from the checkpoint, or by merging other rows.

Who owns what: a task owns the rows that it gave memory to, until it is ready, when they pass to
the caller, or over for another reason, when it takes their memory away again. Tasks run one after
another. Until a task is over, ``RowFiller.claimed`` names the rows that it relies on, and the
owner of the rows releases none of those. A row that a variant needs is named to ``start`` even if
it has memory already, which may be for a running task's own use only.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from liveprune.patches.expert_packing import Packing
from liveprune.patches.expert_reader import ExpertReader
from liveprune.patches.fill_task import FillTask
from liveprune.patches.layer_fill import LayerFill
from liveprune.patches.neuron_merge import NeuronMerge
from liveprune.patches.row_checks import RowChecks
from liveprune.pruning.errors import EngineError
from liveprune.pruning.plan import Matrix

__all__ = ["FillTask", "MergeJob", "RowFiller", "RowJob", "Rows"]


class Rows(Protocol):
    """The rows of one layer, with memory behind some of them."""

    @property
    def w13(self) -> torch.Tensor:
        """[rows, ...]; each row contiguous."""

    @property
    def w2(self) -> torch.Tensor:
        """[rows, ...]; each row contiguous."""

    @property
    def resident(self) -> frozenset[int]:
        """Rows that have memory."""

    def commit(self, rows: Collection[int]) -> None:
        """Give rows memory."""

    def release(self, rows: Collection[int]) -> int:
        """Take the memory of rows away, if they have any; returns the bytes given back."""


@dataclass(frozen=True)
class RowJob:
    """One expert into one row. Base expert e has row e; other rows may hold copies."""

    layer: int
    row: int
    expert: int


@dataclass(frozen=True, eq=False)
class MergeJob:
    """Linear combinations of a layer's base experts into spare rows."""

    layer: int
    rows: tuple[int, ...]
    coefficients: Matrix
    """[rows, experts] float32."""


class RowFiller:
    """Runs fill tasks, one after another, on threads that give way to the engine's."""

    def __init__(
        self,
        reader: ExpertReader,
        packing: Mapping[int, Packing],
        rows: Mapping[int, Rows],
        *,
        threads: int = 2,
        protect: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Fill ``rows`` from ``reader``; all by layer.

        Args:
            reader: of the rank's checkpoint slices.
            packing: layout of each layer's rows.
            rows: the rows themselves.
            threads: each reads and packs one expert at a time.
            protect: the lock of the rows' owner, where several of its threads start tasks or
                release rows: held while a task looks at ``resident``, commits or releases.

        Raises:
            EngineError: the rows are not what reader and packing make.
        """
        self.reader, self.packing, self.rows = reader, packing, rows
        self.threads, self.protect = threads, protect
        self.device = next(iter(rows.values())).w13.device
        self.checks = RowChecks()
        self._turns = threading.Condition()
        self._queue: list[FillTask] = []
        for layer, layer_rows in rows.items():
            _check_layout(layer, layer_rows, packing[layer], reader)

    def start(
        self,
        jobs: Iterable[RowJob],
        merges: Iterable[MergeJob] = (),
        needed: Iterable[tuple[int, int]] = (),
        gathers: Iterable[NeuronMerge] = (),
    ) -> FillTask:
        """Start a task, to run after those started before; returns at once.

        Args:
            jobs: experts to read. Rows of base experts that have memory are only verified.
            merges: rows to compute. Sources without memory get it while that takes.
            needed: further (layer, row) that must be right: a base expert's is filled if it has
                no memory; a spare one must have been written by an earlier task.
            gathers: rows to compute neuron by neuron, from the checkpoint.

        Raises:
            EngineError: a job names a layer, row or expert that is not there, or a row twice; or
                the system has no thread to give.
        """
        task = FillTask(self, self._layers([*jobs], [*merges], [*needed], [*gathers]))
        with self._turns:
            self._queue.append(task)
            try:
                task.begin()
            except EngineError:
                self._queue.remove(task)
                raise
        return task

    def claimed(self, layer: int) -> frozenset[int]:
        """Rows of a layer that tasks rely on; their owner must not release them now."""
        with self._turns:
            return frozenset().union(*(task.claims(layer) for task in self._queue))

    def await_turn(self, task: FillTask) -> None:
        """Return when ``task`` is the oldest that is not over, or cancelled."""
        with self._turns:
            self._turns.wait_for(lambda: task.cancelled or self._queue[0] is task)

    def wake(self) -> None:
        """A task was cancelled, perhaps a waiting one."""
        with self._turns:
            self._turns.notify_all()

    def leave(self, task: FillTask, over: threading.Event) -> None:
        """Set ``over`` and drop the claims of ``task``, seen by others as one."""
        with self._turns:
            self._queue.remove(task)
            over.set()
            self._turns.notify_all()

    def _layers(
        self,
        jobs: list[RowJob],
        merges: list[MergeJob],
        needed: list[tuple[int, int]],
        gathers: list[NeuronMerge],
    ) -> list[LayerFill]:
        layers = {job.layer for job in jobs} | {merge.layer for merge in merges}
        layers |= {layer for layer, _ in needed} | {gather.plan.layer for gather in gathers}
        if layers - self.rows.keys():
            raise EngineError(
                f"fill: found layers {sorted(layers)}, expected some of {sorted(self.rows)}"
            )
        return [
            self._layer(
                layer,
                [job for job in jobs if job.layer == layer],
                [merge for merge in merges if merge.layer == layer],
                [gather for gather in gathers if gather.plan.layer == layer],
                frozenset(row for where, row in needed if where == layer),
            )
            for layer in sorted(layers)
        ]

    def _layer(
        self,
        layer: int,
        jobs: list[RowJob],
        merges: list[MergeJob],
        gathers: list[NeuronMerge],
        needed: frozenset[int],
    ) -> LayerFill:
        count, experts = len(self.rows[layer].w13), self.reader.experts(layer)
        computed = [row for merge in merges for row in merge.rows]
        computed += [row for gather in gathers for row in gather.rows]
        written = [job.row for job in jobs] + computed
        beyond = sorted(row for row in {*written, *needed} if not 0 <= row < count)
        if beyond:
            raise EngineError(f"layer {layer}: found rows {beyond}, expected 0 to {count - 1}")
        twice = sorted(row for row, times in Counter(written).items() if times > 1)
        if twice:
            raise EngineError(f"layer {layer}: found rows {twice} twice, expected one job a row")
        for job in jobs:
            _check_job(job, experts)
        for merge in merges:
            _check_merge(merge, experts)
        base = [row for row in computed if row < experts]
        if base:
            raise EngineError(
                f"layer {layer}: found merges into rows {base}, expected spare rows, {experts} "
                f"and above"
            )
        # A base expert's row holds that expert and no other, so it can be filled unasked.
        fills = {row: row for row in needed if row < experts} | {
            job.row: job.expert for job in jobs
        }
        return LayerFill(self, layer, fills, merges, gathers, needed)


def _check_layout(layer: int, rows: Rows, packing: Packing, reader: ExpertReader) -> None:
    found = (tuple(rows.w13.shape[1:]), tuple(rows.w2.shape[1:]), rows.w13.dtype)
    expected = (*packing.row_shapes(), reader.dtype)
    if found != expected or packing.expert_shapes() != reader.shapes:
        raise EngineError(
            f"layer {layer}: rows are {found}, expected {expected} for experts of "
            f"{reader.shapes}, packed from {packing.expert_shapes()}"
        )


def _check_job(job: RowJob, experts: int) -> None:
    if not 0 <= job.expert < experts or (job.row < experts and job.row != job.expert):
        raise EngineError(
            f"layer {job.layer}: found expert {job.expert} for row {job.row}, expected one of "
            f"{experts} experts, in its own row or in a spare one"
        )


def _check_merge(merge: MergeJob, experts: int) -> None:
    expected = (len(merge.rows), experts)
    if merge.coefficients.shape != expected or merge.coefficients.dtype != np.float32:
        raise EngineError(
            f"layer {merge.layer}: found {merge.coefficients.dtype} coefficients "
            f"{merge.coefficients.shape}, expected float32 {expected}"
        )
