"""Which experts users' tokens are routed to, counted on the running engine for each slot.

The routing of every layer leaves its choice in buffers that stay at one address: two copies, of a
shape that no data decides, so CUDA graphs can capture them. Before the next batch they are added up
for all layers at once, outside of any graph. Nothing waits for the device.

What the sums mean is said in ``pruning.calibration.statistics``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save

from liveprune.patches.batch_slots import BatchSlots
from liveprune.patches.routing_tables import LayerTables
from liveprune.patches.sampled_outputs import SampledOutputs
from liveprune.pruning.plan import LayerPlan

CHUNK = 1 << 18
"""Choices that are added up at once: about 12 MB of memory beside the model."""
RETIRED = 64
"""Variants that are no longer live and whose sums are kept; the oldest go first."""

Arrays = dict[str, npt.NDArray[np.float64]]
Rows = Mapping[int, Sequence[int]]
"""By layer index: the expert row of each column of the statistics, -1 for none."""


class LiveStatistics:
    """Sums of one worker, on its thread; every tensor-parallel rank has the same.

    Attributes:
        sums: float64 [layers, slots, rows, 3]: of weight^0, ^1, ^2 of the tokens sent to a row.
    """

    def __init__(
        self,
        tables: Mapping[int, LayerTables],
        batch: BatchSlots,
        device: torch.device,
        *,
        outputs: SampledOutputs | None = None,
    ) -> None:
        """Count every batch of ``batch`` from here on.

        Args:
            tables: of all layers, by index; their ``top_k`` becomes a view of one tensor for all.
            batch: which token is whose.
            device: of the sums.
            outputs: what experts answer to a sample of the tokens; None: nobody asks.
        """
        self._tables, self._batch, self._outputs = dict(tables), batch, outputs
        every = list(self._tables.values())
        columns = max(x.base_top_k for x in every)
        self._width = max(x.rows + len(x.constants) for x in every)
        layers, slots, most = len(every), every[0].slots, len(batch.slots)
        self._top_k = torch.stack([x.top_k for x in every])
        for i, x in enumerate(every):
            x.top_k = self._top_k[i]
        self._weights = torch.zeros(layers, most, columns, device=device)
        self._rows = torch.zeros(layers, most, columns, dtype=torch.int32, device=device)
        self._counted = torch.zeros(most, dtype=torch.bool, device=device)
        self.sums = torch.zeros(layers, slots, self._width, 3, dtype=torch.float64, device=device)
        self._ranks = torch.arange(columns, device=device)
        self._offsets = torch.arange(layers, device=device) * (slots * self._width)
        self._pending: int = 0
        self._pending_slots = np.zeros(0, np.int64)
        self._tokens = np.zeros(slots, np.int64)
        self._retired: dict[str, tuple[int, Arrays]] = {}
        batch.before_change, batch.after_fill = self.fold, self._start

    @property
    def pending(self) -> bool:
        """The batch has tokens that are counted."""
        return self._pending > 0

    def recorder(self, index: int) -> LayerRecorder:
        """What the routing of a layer calls with its choice."""
        place = list(self._tables).index(index)
        return LayerRecorder(self, place, self._weights[place], self._rows[place], self._outputs)

    @property
    def records(self) -> bool:
        """Routing must leave its choice; under CUDA graphs it always does."""
        return self._batch.static or self.pending

    def fold(self) -> None:
        """Add up what the last batch left. Before slots, tables or rows change."""
        tokens = self._pending
        if not tokens:
            return
        slots = self._batch.view(tokens)
        if self._outputs is not None:
            self._outputs.fold(self._weights, self._rows, slots, self._top_k)
        counted = self._counted[:tokens, None]
        for part in self._parts(tokens):
            top_k = self._top_k[part].index_select(1, slots).unsqueeze(-1)
            taken = ((self._ranks < top_k) & counted).double()
            weights = self._weights[part, :tokens].double() * taken
            values = torch.stack((taken, weights, weights * weights), -1)
            places = self._rows[part, :tokens].long() + (slots * self._width).unsqueeze(-1)
            places += self._offsets[part, None, None]
            self.sums.view(-1, 3).index_add_(0, places.view(-1), values.view(-1, 3))
        self._tokens += np.bincount(self._pending_slots, minlength=len(self._tokens))
        self._pending = 0

    def leave(self, slot: int, key: str, rows: Rows) -> None:
        """The slot becomes free: keep the sums of the variant that had it."""
        self.fold()
        found = self._of_slot(slot, rows)
        if found[0]:
            before = self._retired.pop(key, None)
            self._retired[key] = found if before is None else _added(before, found)
            while len(self._retired) > RETIRED:
                del self._retired[next(iter(self._retired))]
        self.sums[:, slot] = 0
        self._tokens[slot] = 0
        if self._outputs is not None:
            self._outputs.clear(slot)

    def read(self, live: Mapping[int, tuple[str, Rows]]) -> dict[str, dict[str, Any]]:
        """Everything since the start, by variant: see ``live_counts``.

        ``live``: by slot, the variant's key and rows.
        """
        self.fold()
        found = dict(self._retired)
        for slot, (key, rows) in live.items():
            own = self._of_slot(slot, rows)
            if own[0]:
                found[key] = _added(found[key], own) if key in found else own
        return {key: {"tokens": n, "arrays": save(arrays)} for key, (n, arrays) in found.items()}

    def _start(self, slots: npt.NDArray[np.int64], counted: npt.NDArray[np.bool_]) -> None:
        """Note which tokens of the batch that comes now are counted."""
        self._pending, self._pending_slots = len(counted), slots[counted]
        flags = torch.from_numpy(counted)
        if not self._counted.is_cpu:
            flags = flags.pin_memory()
        self._counted[: len(counted)].copy_(flags, non_blocking=True)
        if self._outputs is not None:
            self._outputs.choose(counted)

    def _parts(self, tokens: int) -> Iterator[slice]:
        """Runs of layers with at most ``CHUNK`` choices in all, or one layer."""
        size = max(CHUNK // (tokens * len(self._ranks)), 1)
        for start in range(0, len(self._top_k), size):
            yield slice(start, start + size)

    def _of_slot(self, slot: int, rows: Rows) -> tuple[int, Arrays]:
        """Tokens, and the arrays of all layers by columns."""
        if not self._tokens[slot]:
            return 0, {}
        sums = self.sums[:, slot].cpu().numpy()
        arrays = {}
        for place, index in enumerate(self._tables):
            arrays[f"{index}.sums"] = _columns(sums[place], rows[index], 0.0)
            if self._outputs is not None:
                sampled, largest = self._outputs.read(place, slot)
                arrays[f"{index}.sampled"] = _columns(sampled, rows[index], 0.0)
                arrays[f"{index}.largest"] = _columns(largest, rows[index], -np.inf)
        return int(self._tokens[slot]), arrays


class LayerRecorder:
    """Copies one layer's choice into the buffers of ``LiveStatistics``."""

    def __init__(
        self,
        statistics: LiveStatistics,
        place: int,
        weights: torch.Tensor,
        rows: torch.Tensor,
        outputs: SampledOutputs | None,
    ) -> None:
        self._statistics, self._place = statistics, place
        self._weights, self._rows, self._outputs = weights, rows, outputs

    def __call__(
        self, hidden_states: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Note what the layer's tokens were sent to: [tokens, hidden], [tokens, columns] twice."""
        if not self._statistics.records:
            return
        tokens, columns = weights.shape
        self._weights[:tokens, :columns].copy_(weights)
        self._rows[:tokens, :columns].copy_(rows)
        if self._outputs is not None:
            self._outputs.record(self._place, hidden_states)


def columns_of(
    plan: LayerPlan | None, tables: LayerTables, slot: int, rows: Sequence[int]
) -> list[int]:
    """The expert row of each column of a slot's statistics in one layer.

    A column is a base expert, -1 for one that the plan prunes; where the plan merges, it is an
    expert after the plan.

    Args:
        plan: of the layer; None: the base model.
        tables: of the layer, with the slot live.
        slot: of the variant.
        rows: row of each expert after the plan, in its order.
    """
    if plan is None or plan.merges or plan.mapping in ("router_map", "expert_map"):
        return list(rows)
    found = [-1] * tables.experts
    for expert, row in zip(plan.kept, rows, strict=True):
        found[expert] = row
    if plan.constants is not None:
        for expert in plan.pruned:
            found[expert] = int(tables.row_of[slot, expert])
    return found


def _columns(values: npt.NDArray[Any], rows: Sequence[int], nowhere: float) -> Any:
    taken = np.asarray(values, np.float64)[np.maximum(rows, 0)]
    taken[np.asarray(rows) < 0] = nowhere
    return taken


def _added(one: tuple[int, Arrays], other: tuple[int, Arrays]) -> tuple[int, Arrays]:
    arrays = {
        name: np.maximum(x, other[1][name]) if name.endswith("largest") else x + other[1][name]
        for name, x in one[1].items()
    }
    return one[0] + other[0], arrays
