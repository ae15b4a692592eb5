"""Routing tables of one layer: which experts each slot's tokens may use, and which rows those are.

The tensors keep their addresses for the life of the engine and are written in place between two
steps, so that captured CUDA graphs stay valid. What the host must know to choose a path stands in
plain lists beside them: no tensor is read back while the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from liveprune.patches.live_types import BASE_SLOT
from liveprune.pruning.errors import EngineError
from liveprune.pruning.plan import LayerPlan


class LayerTables:
    """Tables of ``slots`` variants over one layer's expert rows.

    Rows 0 to ``experts - 1`` of the layer's expert tensor are its base experts, the ``spare`` rows
    after them hold merged experts. A slot is free, or it selects among experts by their own scores
    (``set_base``, ``set_kept``), or among mixtures of all scores (``set_mapped``; EEP).

    In a layer whose checkpoint has a router map itself, every slot selects by that map.

    An expert may also answer with a constant vector of the slot instead of computing (MoNE). It is
    then sent to a row beyond the last, ``rows + i`` for vector i of the pool, which no kernel must
    see: ``live_router`` takes these choices out.

    Attributes:
        allow: bool [slots, experts]; experts that a token of the slot may select.
        top_k: int64 [slots]; active experts per token, 0 for a free slot.
        row_of: int64 [slots, experts]; row that an expert's work is done by.
        is_mapped: bool [slots]; the slot selects by the router map.
        map_allow: bool [slots, map rows]; map rows that belong to the slot.
        router_map: float32 [map rows, gate width]; a score is such a row times the probabilities.
        map_row: int64 [map rows]; row of the expert that the score is for.
        constants: float32 [pool, hidden]; vectors of all slots, zero where free. The pool has as
            many as there are spare rows.
        stand_in: int64 [slots]; a row of the slot that a constant's place is sent to with weight 0.
        top_ks: ``top_k`` for the host.
        mapped: ``is_mapped`` for the host.
        remapped: for the host, per slot: ``row_of`` is not the identity.
        constant: for the host, per slot: some of its experts are constant.
    """

    def __init__(
        self,
        slots: int,
        experts: int,
        spare: int,
        top_k: int,
        *,
        hidden: int = 0,
        base_map: torch.Tensor | None = None,
        device: torch.device | str,
    ) -> None:
        """All slots are free.

        Args:
            slots: variants that can be live at once, the base included.
            experts: base experts of the layer.
            spare: rows for merged experts.
            top_k: the base's active experts per token; no slot can have more.
            hidden: size of an expert's output; 0: no slot can have constants.
            base_map: the checkpoint's own router map [experts, gate width], or None.
            device: of the tensors.
        """
        self.slots, self.experts, self.spare, self.base_top_k = slots, experts, spare, top_k
        self.has_base_map = base_map is not None
        if base_map is not None:
            width, map_rows = base_map.shape[1], experts
        else:
            # As many as merged experts; top-k itself needs no fewer candidates than it takes.
            width, map_rows = experts, max(spare, top_k) if spare else 0
        self.allow = torch.zeros(slots, experts, dtype=torch.bool, device=device)
        self.top_k = torch.zeros(slots, dtype=torch.int64, device=device)
        identity = torch.arange(experts, device=device)
        self.row_of = identity.repeat(slots, 1)
        self.is_mapped = torch.zeros(slots, dtype=torch.bool, device=device)
        self.map_allow = torch.zeros(slots, map_rows, dtype=torch.bool, device=device)
        self.router_map = torch.zeros(map_rows, width, dtype=torch.float32, device=device)
        self.map_row = torch.zeros(map_rows, dtype=torch.int64, device=device)
        if base_map is not None:
            self.router_map.copy_(base_map)
            self.map_row.copy_(identity)
        pool = spare if hidden and base_map is None else 0
        self.constants = torch.zeros(pool, hidden, dtype=torch.float32, device=device)
        self.stand_in = torch.zeros(slots, dtype=torch.int64, device=device)
        self.constant = [False] * slots
        self._constants: dict[int, list[int]] = {}
        self.top_ks = [0] * slots
        self.mapped = [False] * slots
        self.remapped = [False] * slots
        self._map_rows: dict[int, list[int]] = {}
        # Made once: taking a row of a table costs as much as masking a batch with it.
        self.allow_rows = self.allow.unbind()
        self.row_of_rows = self.row_of.unbind()
        self.map_allow_rows = self.map_allow.unbind()
        self.ranks = torch.arange(top_k, device=device)
        self.nowhere = torch.tensor(float("-inf"), device=device)

    @property
    def can_map(self) -> bool:
        """Some slot may select by a router map."""
        return self.router_map.shape[0] > 0

    @property
    def can_remap(self) -> bool:
        """Some slot may have its experts' work done by other rows than their own."""
        return self.spare > 0 and not self.has_base_map

    @property
    def can_be_constant(self) -> bool:
        """Some slot may have experts that answer with a constant."""
        return len(self.constants) > 0

    @property
    def rows(self) -> int:
        """Rows of the layer's expert tensor; larger numbers in ``row_of`` are constants."""
        return self.experts + self.spare

    def write(self, slot: int, plan: LayerPlan | None, rows: Sequence[int]) -> None:
        """Make a slot route by a plan (None: the base).

        Args:
            slot: what was there before is forgotten, also when an error is raised.
            plan: this layer's.
            rows: row of each expert after the plan, in the plan's order.

        Raises:
            EngineError: the plan does not fit the tables.
        """
        if plan is None:
            self.set_base(slot)
        elif plan.router_map is not None:
            self.set_mapped(slot, torch.tensor(plan.router_map), rows, plan.top_k)
        elif plan.expert_map:
            self.set_kept(slot, range(self.experts), plan.top_k, [rows[j] for j in plan.expert_map])
        elif plan.constants is not None:
            vectors = dict(zip(plan.pruned, torch.tensor(plan.constants), strict=True))
            self.set_constant(slot, plan.kept, plan.top_k, vectors)
        else:
            self.set_kept(slot, plan.kept, plan.top_k, rows)

    def set_base(self, slot: int) -> None:
        """Every expert, the base's own top-k."""
        self._set_kept(slot, range(self.experts), self.base_top_k, None)

    def set_kept(
        self, slot: int, kept: Sequence[int], top_k: int, rows: Sequence[int] | None = None
    ) -> None:
        """Some experts, selected by their own scores.

        Args:
            slot: not the base's.
            kept: expert ids.
            top_k: active experts per token.
            rows: the row that does the work of each; None: their own.

        Raises:
            EngineError: an id, a row or the top-k is out of range; rows of other experts where
                there are no spare rows.
        """
        self._refuse_base(slot)
        self._set_kept(slot, kept, top_k, rows)

    def _set_kept(
        self,
        slot: int,
        kept: Sequence[int],
        top_k: int,
        rows: Sequence[int] | None,
        end: int | None = None,
    ) -> None:
        self.clear(slot)
        rows = kept if rows is None else rows
        remapped = list(rows) != list(kept)
        if len(rows) != len(kept):
            raise EngineError(f"slot {slot}: found {len(rows)} rows, expected {len(kept)}")
        self._check_ids(slot, "expert ids", kept, self.experts)
        self._check_ids(slot, "rows", rows, self.rows if end is None else end)
        self._check_top_k(slot, top_k, len(kept))
        if remapped and not self.can_remap:
            raise EngineError(
                f"slot {slot}: found rows {list(rows)}, expected the experts' own {list(kept)}: "
                f"there are no spare rows (--spare-rows)"
            )
        ids = torch.tensor(list(kept), device=self.allow.device)
        if self.has_base_map:
            self.map_allow[slot, ids] = True
        else:
            self.allow[slot, ids] = True
            self.row_of[slot, ids] = torch.tensor(list(rows), device=ids.device)
        self._set_facts(slot, top_k, mapped=self.has_base_map, remapped=remapped)

    def set_constant(
        self, slot: int, kept: Sequence[int], top_k: int, vectors: Mapping[int, torch.Tensor]
    ) -> None:
        """All experts by their own scores; some answer with a constant.

        Args:
            slot: not the base's.
            kept: ids of the experts that compute.
            top_k: active experts per token, constant ones included.
            vectors: [hidden] for each other expert.

        Raises:
            EngineError: an expert that neither computes nor has a vector, or does both; too few
                free vectors in the pool, or vectors of another size.
        """
        self._refuse_base(slot)
        self.clear(slot)
        if not vectors or not kept or sorted([*kept, *vectors]) != list(range(self.experts)):
            raise EngineError(
                f"slot {slot}: found kept {list(kept)} and constants for {list(vectors)}, expected "
                f"each of {self.experts} experts in one of the two, neither empty"
            )
        taken = {i for places in self._constants.values() for i in places}
        free = [i for i in range(len(self.constants)) if i not in taken]
        if len(free) < len(vectors):
            raise EngineError(
                f"slot {slot}: found {len(free)} free constant vectors, expected {len(vectors)} "
                f"(--spare-rows)"
            )
        places = dict(zip(vectors, free, strict=False))
        for expert, vector in vectors.items():
            if vector.shape != self.constants.shape[1:]:
                raise EngineError(
                    f"slot {slot}: expert {expert}'s constant is {tuple(vector.shape)}, expected "
                    f"{tuple(self.constants.shape[1:])}"
                )
        rows = [self.rows + places[i] if i in places else i for i in range(self.experts)]
        self._set_kept(slot, range(self.experts), top_k, rows, end=self.rows + len(self.constants))
        self._constants[slot] = list(places.values())
        for expert, place in places.items():
            self.constants[place] = vectors[expert].to(self.constants)
        self.stand_in[slot] = kept[0]
        self.constant[slot] = True

    def set_mapped(
        self, slot: int, router_map: torch.Tensor, rows: Sequence[int], top_k: int
    ) -> None:
        """Merged experts, selected by mixtures of the base's probabilities (EEP).

        Args:
            slot: not the base's.
            router_map: [merged experts, experts] float32.
            rows: the row of each merged expert.
            top_k: active experts per token.

        Raises:
            EngineError: too few free map rows; a map of another width; a row or the top-k is out of
                range; the checkpoint has a router map of its own.
        """
        self._refuse_base(slot)
        self.clear(slot)
        if self.has_base_map:
            raise EngineError(f"slot {slot}: found a router map over the checkpoint's own one")
        if router_map.shape != (len(rows), self.experts):
            raise EngineError(
                f"slot {slot}: router map is {tuple(router_map.shape)}, expected "
                f"{(len(rows), self.experts)}"
            )
        self._check_ids(slot, "rows", rows, self.experts + self.spare)
        self._check_top_k(slot, top_k, len(rows))
        taken = {row for rows_of_slot in self._map_rows.values() for row in rows_of_slot}
        free = [row for row in range(len(self.map_row)) if row not in taken]
        if len(free) < len(rows):
            raise EngineError(
                f"slot {slot}: found {len(free)} free rows of the router map, expected "
                f"{len(rows)} (--spare-rows)"
            )
        self._map_rows[slot] = free[: len(rows)]
        places = torch.tensor(self._map_rows[slot], device=self.map_row.device)
        self.router_map[places] = router_map.to(self.router_map)
        self.map_row[places] = torch.tensor(list(rows), device=places.device)
        self.map_allow[slot, places] = True
        self._set_facts(slot, top_k, mapped=True, remapped=False)

    def clear(self, slot: int) -> None:
        """Make a slot free; no request may use it from here on."""
        if not 0 <= slot < self.slots:
            raise EngineError(f"slot {slot}: expected 0 to {self.slots - 1}")
        self._map_rows.pop(slot, None)
        for place in self._constants.pop(slot, ()):
            self.constants[place] = 0
        self.constant[slot] = False
        self.allow[slot] = False
        self.map_allow[slot] = False
        self.row_of[slot] = torch.arange(self.experts, device=self.row_of.device)
        self._set_facts(slot, 0, mapped=False, remapped=False)

    def needed_rows(self, slot: int) -> frozenset[int]:
        """Rows that tokens of the slot may be sent to, from the tensors that send them there."""
        own = self.row_of[slot][self.allow[slot]]
        mapped = self.map_row[self.map_allow[slot]]
        rows = frozenset(own[own < self.rows].tolist()) | frozenset(mapped.tolist())
        return rows | {int(self.stand_in[slot])} if self.constant[slot] else rows

    def _set_facts(self, slot: int, top_k: int, *, mapped: bool, remapped: bool) -> None:
        self.top_k[slot] = top_k
        self.is_mapped[slot] = mapped
        self.top_ks[slot], self.mapped[slot], self.remapped[slot] = top_k, mapped, remapped

    @staticmethod
    def _refuse_base(slot: int) -> None:
        if slot == BASE_SLOT:
            raise EngineError(f"slot {slot}: it is the base model's, expected another for a plan")

    def _check_top_k(self, slot: int, top_k: int, candidates: int) -> None:
        most = min(candidates, self.base_top_k)
        if not 1 <= top_k <= most:
            raise EngineError(f"slot {slot}: top-k is {top_k}, expected 1 to {most}")

    @staticmethod
    def _check_ids(slot: int, what: str, ids: Sequence[int], end: int) -> None:
        """Kernels check no ids: a wrong one reads or writes foreign memory."""
        if any(not 0 <= i < end for i in ids):
            raise EngineError(f"slot {slot}: found {what} {list(ids)}, expected 0 to {end - 1}")
