"""Live variants in a worker: routing tables, expert rows, and the one invariant between them.

No live table names a row that is not resident. ``LiveWorker._check`` is the only place that says
so, and it runs at every publication and every release. All methods but the filler's run on the
worker's own thread, between two steps of the model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from liveprune.patches.candidates import Candidates
from liveprune.patches.expert_reader import ExpertReader
from liveprune.patches.live_config import LiveConfig
from liveprune.patches.live_counts import BASE_KEY
from liveprune.patches.live_layers import LiveLayer, batch_slots, find_layers, live_statistics
from liveprune.patches.live_statistics import columns_of
from liveprune.patches.live_types import BASE_SLOT
from liveprune.patches.request_scoring import RequestScores, attach
from liveprune.patches.row_assignment import Assignment, assign_rows
from liveprune.patches.row_filler import FillTask, MergeJob, RowFiller
from liveprune.pruning.errors import EngineError, LiveprunError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Plan
from liveprune.pruning.plan_guards import check_plan
from liveprune.pruning.plan_io import load_plan

RELEASE_BYTES = 1 << 30
"""Bytes given back in one call: a few milliseconds, so that no step waits long."""


@dataclass
class Slot:
    """A variant that is being prepared, or live."""

    plan: Plan | None
    """None: the base model."""
    assignments: dict[int, Assignment]
    task: FillTask
    live: bool = False


class LiveWorker:
    """Slots and rows of one worker process; ``live_operations`` calls its methods by name.

    Attributes:
        spec: of the checkpoint.
        runner: vLLM's model runner.
        model: vLLM's model.
        batch: which token is whose.
        candidates: plans of a search that are live for a moment.
        scores: answers of requests that are being scored.
        layers: by index.
        statistics: of users' tokens; None where they are off.
    """

    def __init__(self, worker: Any, config: LiveConfig) -> None:
        """``worker``: vLLM's, its model loaded without experts. Fills what is live at start.

        Raises:
            LiveprunError: the model's layout cannot have elastic rows, or a row is damaged.
        """
        self._config = config
        # The filler gives rows memory on its own threads.
        self._lock = threading.RLock()
        self._device = worker.device
        self.spec = ModelSpec.from_path(Path(config.checkpoint))
        self.runner = worker.model_runner
        self.model = self.runner.get_model()
        self.batch = batch_slots(worker, config)
        self.runner.liveprune_batch = self.batch
        self.layers = find_layers(self.model, self.spec, config, self.batch, self._device)
        parallel = worker.parallel_config
        reader = ExpertReader(
            Path(config.checkpoint),
            self.spec,
            dtype=worker.model_config.dtype,
            tp_rank=worker.rank % parallel.tensor_parallel_size,
            tp_size=parallel.tensor_parallel_size,
        )
        self._filler = RowFiller(
            reader,
            {index: layer.packing for index, layer in self.layers.items()},
            {index: layer.rows for index, layer in self.layers.items()},
            protect=lambda: self._lock,
        )
        self._slots: dict[int, Slot] = {}
        self.candidates = Candidates(self.layers, self.spec, reader)
        dtype = worker.model_config.dtype
        self.scores = RequestScores(worker.model_config.get_hidden_size() * dtype.itemsize)
        attach(self.runner, self.scores)
        self.statistics = live_statistics(self.layers, config, self.batch, dtype, self._device)
        self._start(config)

    def prepare(self, slot: int, plan: str | None) -> None:
        """Start filling the rows of a slot; see ``server.engine.LiveEngine``."""
        if slot in self._slots or slot in self.candidates.slots:
            raise EngineError(f"slot {slot}: in use, expected a free slot")
        if any(other.task.running for other in self._slots.values()):
            raise EngineError("another variant's rows are being filled; one at a time")
        recipe = None if plan is None else load_plan(Path(plan))
        if recipe is not None:
            check_plan(recipe, self.spec)
        assignments = {
            layer.index: assign_rows(
                _layer_plan(recipe, layer), layer.experts, self._free_spare(layer)
            )
            for layer in self.layers.values()
        }
        self._slots[slot] = Slot(recipe, assignments, self._fill(assignments))

    def progress(self, slot: int) -> dict[str, Any]:
        return asdict(self._slot(slot).task.progress())

    def cancel(self, slot: int) -> None:
        """Forget a slot that is not live; its rows go with the next release."""
        found = self._slots.get(slot)
        if found is None:
            return
        if found.live:
            raise EngineError(f"slot {slot}: live; expected one that was never published")
        found.task.cancel()
        found.task.wait()
        del self._slots[slot]

    def publish(self, slot: int) -> None:
        """Write the slot's tables; it is live when this returns."""
        found = self._slot(slot)
        progress = found.task.progress()
        if progress.phase != "ready":
            raise EngineError(
                f"slot {slot}: rows are {progress.phase}, expected ready {progress.error}".rstrip()
            )
        found.live = True
        try:
            for layer in self.layers.values():
                layer.tables.write(
                    slot, _layer_plan(found.plan, layer), found.assignments[layer.index].rows
                )
            self._check()
        except EngineError:
            self.unpublish(slot)
            raise
        self._expose()
        self._choose_default()

    def unpublish(self, slot: int) -> None:
        """Clear the tables; the rows stay, and ``publish`` would bring the slot back."""
        for layer in self.layers.values():
            layer.tables.clear(slot)
        self._slot(slot).live = False
        self._choose_default()

    def retire(self, slot: int) -> None:
        """Make a slot free; ``live_core`` has seen that no request uses it."""
        if not self._slot(slot).live:
            raise EngineError(f"slot {slot}: not live, expected a live slot")
        if sum(other.live for other in self._slots.values()) == 1:
            raise EngineError(f"slot {slot}: the only live one; something must serve")
        if self.statistics is not None:
            self.statistics.leave(slot, *self.columns()[slot])
        self.unpublish(slot)
        del self._slots[slot]

    def release(self) -> int:
        """Give back up to ``RELEASE_BYTES`` of rows that no slot needs."""
        freed = 0
        with self._lock:
            for layer in self.layers.values():
                used = self._needed(layer) | self._filler.claimed(layer.index)
                count = max((RELEASE_BYTES - freed) // layer.rows.row_bytes, 1)
                idle = sorted(layer.rows.resident - used)[:count]
                freed += self._give_back(layer, idle)
                if freed >= RELEASE_BYTES:
                    break
        self._check()
        self._expose()
        return freed

    def memory(self) -> dict[str, Any]:
        """Fields of ``EngineMemory``, of this rank."""
        base = spare = everything = 0
        for layer in self.layers.values():
            size, resident = layer.rows.row_bytes, layer.rows.resident
            everything += size * layer.experts
            base += size * sum(row < layer.experts for row in resident)
            spare += size * sum(row >= layer.experts for row in resident)
        return {
            "base_rows": base,
            "spare_rows": spare,
            "all_base_rows": everything,
            "other_weights": self._other_weights,
            "process": _process_bytes(self._device),
            "slots": {
                slot: sum(
                    layer.rows.row_bytes * len(found.assignments[layer.index].needed)
                    for layer in self.layers.values()
                )
                for slot, found in self._slots.items()
                if found.live
            },
        }

    def checksums(self, slot: int) -> dict[str, int]:
        """CRC-32 of every row that a slot needs, from the bytes in memory."""
        return {
            f"{layer.index}/{row}": self._filler.checks.measure(layer.rows, row)
            for layer in self.layers.values()
            for row in sorted(self._slot(slot).assignments[layer.index].needed)
        }

    def columns(self) -> dict[int, tuple[str, dict[int, list[int]]]]:
        """By live slot: key of its variant, and by layer the rows of its statistics' columns."""
        return {
            slot: (
                BASE_KEY if found.plan is None else found.plan.digest,
                {
                    index: columns_of(
                        _layer_plan(found.plan, layer),
                        layer.tables,
                        slot,
                        found.assignments[index].rows,
                    )
                    for index, layer in self.layers.items()
                },
            )
            for slot, found in self._slots.items()
            if found.live
        }

    def stage(self, plans: list[Plan | None]) -> list[int]:
        """Make candidates live until ``unstage``: as many as fit; see ``Candidates.stage``."""
        if BASE_SLOT not in self._slots or not self._slots[BASE_SLOT].live:
            raise EngineError("candidates expect the full model to be live")
        self.unstage()
        slots = [slot for slot in range(self._config.slots) if slot not in self._slots]
        with self._lock:
            free = {index: self._unused_spare(layer) for index, layer in self.layers.items()}
            try:
                staged = self.candidates.stage(plans, slots, free)
                self._check()
            except LiveprunError:
                self.unstage()
                raise
        self._expose()
        return staged

    def unstage(self) -> None:
        """Take the candidates away."""
        self.candidates.clear()

    def _check(self) -> None:
        """The invariant: no live table names a row that is not resident.

        Raises:
            EngineError: naming slot, layer and rows.
        """
        live = [slot for slot, found in self._slots.items() if found.live]
        live += self.candidates.slots
        for layer in self.layers.values():
            for slot in live:
                missing = layer.tables.needed_rows(slot) - layer.rows.resident
                if missing:
                    raise EngineError(
                        f"slot {slot}, layer {layer.index}: rows {sorted(missing)} are not "
                        f"resident, expected all that its table names"
                    )

    def _needed(self, layer: LiveLayer) -> frozenset[int]:
        """Rows of all slots, live, being prepared or staged."""
        return self.candidates.needed(layer.index).union(
            *(x.assignments[layer.index].needed for x in self._slots.values())
        )

    def _unused_spare(self, layer: LiveLayer) -> list[int]:
        """Spare rows that nothing needs."""
        taken = self._needed(layer) | self._filler.claimed(layer.index)
        rows = range(layer.experts, layer.experts + self._config.spare_rows)
        return [row for row in rows if row not in taken]

    def _free_spare(self, layer: LiveLayer) -> list[int]:
        """Spare rows that nothing needs; what a slot before left in them is given back."""
        with self._lock:
            free = self._unused_spare(layer)
            self._give_back(layer, layer.rows.resident.intersection(free))
        return free

    def _give_back(self, layer: LiveLayer, rows: Collection[int]) -> int:
        self._filler.checks.forget(layer.index, [row for row in rows if row >= layer.experts])
        return layer.rows.release(sorted(rows))

    def _fill(self, assignments: dict[int, Assignment]) -> FillTask:
        merges = [
            MergeJob(index, assignment.merged, assignment.coefficients)
            for index, assignment in assignments.items()
            if assignment.coefficients is not None
        ]
        needed = [
            (index, row)
            for index, assignment in assignments.items()
            for row in assignment.needed.difference(assignment.merged)
        ]
        gathers = [x.neurons for x in assignments.values() if x.neurons is not None]
        return self._filler.start((), merges, needed, gathers)

    def _slot(self, slot: int) -> Slot:
        if slot not in self._slots:
            raise EngineError(f"slot {slot}: free, expected a prepared or live slot")
        return self._slots[slot]

    def _expose(self) -> None:
        for layer in self.layers.values():
            layer.rows.expose(max(layer.rows.resident) + 1)

    def _choose_default(self) -> None:
        """Padding and dummy runs route by a live slot too: they must not meet missing rows."""
        live = [slot for slot, found in self._slots.items() if found.live]
        if live and self.batch.default != min(live):
            self.batch.default = min(live)

    def _start(self, config: LiveConfig) -> None:
        self._other_weights = int(self.model.liveprune_weight_bytes)
        slot = config.resident_slot
        self.prepare(slot, config.resident_plan)
        self._slots[slot].task.wait()
        self.publish(slot)


def _layer_plan(plan: Plan | None, layer: LiveLayer) -> LayerPlan | None:
    return None if plan is None else plan.layer(layer.index)


def _process_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
