"""Candidates of a search, live for a moment: free slots, spare rows, no files, no background.

A staged plan is live under the same invariant as any other. What makes it quick is what it may
assume: the full model is resident, no request streams from it, and the caller waits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from liveprune.patches.answer_scoring import ComputeLogits, score_answers
from liveprune.patches.answer_states import answer_states
from liveprune.patches.expert_reader import ExpertReader
from liveprune.patches.live_layers import LiveLayer
from liveprune.patches.live_types import BASE_SLOT
from liveprune.patches.neuron_merge import write_neurons
from liveprune.patches.packed_forward import PackedForward
from liveprune.patches.row_assignment import Assignment, assign_rows
from liveprune.patches.row_merge import merge_rows
from liveprune.pruning.errors import EngineError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_guards import check_plan

REFERENCE_BYTES = 1 << 28
"""Hidden states of the full model that are kept for later calls, at most."""


class Candidates:
    """Stages plans in the slots that nothing else uses, and scores texts under them."""

    def __init__(
        self, layers: Mapping[int, LiveLayer], spec: ModelSpec, reader: ExpertReader
    ) -> None:
        self._layers = layers
        self._spec = spec
        self._reader = reader
        self._staged: dict[int, dict[int, Assignment]] = {}
        self._reference: dict[TokenRow, torch.Tensor] = {}

    @property
    def slots(self) -> Collection[int]:
        """Slots that hold a candidate now."""
        return self._staged.keys()

    def needed(self, layer: int) -> frozenset[int]:
        """Rows of a layer that staged plans need."""
        return frozenset().union(*(x[layer].needed for x in self._staged.values()))

    def stage(
        self,
        plans: Sequence[Plan | None],
        free_slots: Sequence[int],
        free_rows: Mapping[int, Sequence[int]],
    ) -> list[int]:
        """Make as many plans live as fit, from the first on; their slots (a plan None: the base's).

        Args:
            plans: of this model; None needs no slot.
            free_slots: that nothing uses.
            free_rows: spare rows by layer, that nothing uses.

        Raises:
            EngineError: the first does not fit, or an expert that it needs is not resident.
            PlanError: a plan is not for this model, or its merged values are not finite.
        """
        slots, free = list(free_slots), {index: list(rows) for index, rows in free_rows.items()}
        placed: list[int] = []
        for plan in plans:
            if plan is None:
                placed.append(BASE_SLOT)
                continue
            check_plan(plan, self._spec)
            try:
                placed.append(self._place(plan, slots, free))
            except EngineError:
                if not placed:
                    raise
                break
        self._merge()
        return placed

    def clear(self) -> None:
        """Take all staged plans away; their rows keep their memory for the next."""
        for slot in self._staged:
            self._clear_tables(slot)
        self._staged.clear()

    def score(
        self,
        forward: PackedForward,
        compute_logits: ComputeLogits,
        slots: Sequence[int],
        rows: Sequence[TokenRow],
        blocks: Sequence[int],
        *,
        against_full: bool,
    ) -> list[AnswerScores | None]:
        """Score the rows' answers under each slot; None where this rank has no logits.

        Args:
            forward: of the worker's model.
            compute_logits: of the model.
            slots: staged, or the base's.
            rows: none longer than ``forward.max_tokens`` + 1.
            blocks: KV blocks that nobody else uses; see ``answer_states``.
            against_full: also compare with the full model, which must be live.
        """
        reference = None
        if against_full:
            missing = [row for row in dict.fromkeys(rows) if row not in self._reference]
            if missing:
                full = answer_states(forward, [BASE_SLOT], missing, blocks)
                self._reference.update(zip(missing, full, strict=True))
            reference = torch.cat([self._reference[row] for row in rows])
            self._bound_reference()
        states = answer_states(forward, slots, rows, blocks)
        targets = np.concatenate([np.array(row.answer, np.int64) for row in rows])
        on_device = torch.from_numpy(targets).to(states[0].device)
        vocabulary = int(self._spec.config["vocab_size"])
        return [
            score_answers(
                compute_logits,
                torch.cat(states[place * len(rows) : (place + 1) * len(rows)]),
                on_device,
                vocabulary,
                reference,
            )
            for place in range(len(slots))
        ]

    def _place(self, plan: Plan, slots: list[int], free: dict[int, list[int]]) -> int:
        if not slots:
            raise EngineError("no slot is free for a candidate (--max-variants)")
        assignments = {
            index: assign_rows(plan.layer(index), layer.experts, free[index])
            for index, layer in self._layers.items()
        }
        for index, layer in self._layers.items():
            own = assignments[index].needed.difference(assignments[index].merged)
            _check_resident(layer, own)
        slot = slots[0]
        try:
            for index, layer in self._layers.items():
                layer.tables.write(slot, plan.layer(index), assignments[index].rows)
        except EngineError:
            self._clear_tables(slot)
            raise
        slots.pop(0)
        for index, assignment in assignments.items():
            free[index] = free[index][len(assignment.merged) :]
        self._staged[slot] = assignments
        return slot

    def _merge(self) -> None:
        """Compute all merged rows; a layer's experts are read once for all candidates."""
        for index, layer in self._layers.items():
            mine = [x[index] for x in self._staged.values()]
            self._gather(layer, mine)
            mixed = [x for x in mine if x.coefficients is not None]
            if not mixed:
                continue
            coefficients = np.concatenate([x.coefficients for x in mixed])
            targets = [row for x in mixed for row in x.merged]
            used = [int(i) for i in np.flatnonzero(coefficients.any(axis=0))]
            _check_resident(layer, used)
            layer.rows.commit([row for row in targets if row not in layer.rows.resident])
            weights = torch.from_numpy(coefficients[:, used])
            for tensor in (layer.rows.w13, layer.rows.w2):
                sources = [tensor[i].view(-1) for i in used]
                merge_rows(weights, sources, [tensor[j].view(-1) for j in targets])

    def _gather(self, layer: LiveLayer, assignments: Sequence[Assignment]) -> None:
        """Compute the rows that are put together neuron by neuron."""
        for merge in (x.neurons for x in assignments if x.neurons is not None):
            layer.rows.commit([row for row in merge.rows if row not in layer.rows.resident])
            for row in merge.rows:
                row13, row2 = layer.rows.w13[row], layer.rows.w2[row]
                write_neurons(merge, row, self._reader, layer.packing, row13, row2)

    def _clear_tables(self, slot: int) -> None:
        for layer in self._layers.values():
            layer.tables.clear(slot)

    def _bound_reference(self) -> None:
        size = sum(states.nbytes for states in self._reference.values())
        while size > REFERENCE_BYTES:
            size -= self._reference.pop(next(iter(self._reference))).nbytes


def _check_resident(layer: LiveLayer, experts: Collection[int]) -> None:
    missing = sorted(set(experts) - layer.rows.resident)
    if missing:
        raise EngineError(
            f"layer {layer.index}: experts {missing} are not resident; candidates expect the full "
            f"model to be live"
        )
