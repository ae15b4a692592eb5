"""Put live variants in front of one vLLM router, on the instance: vLLM's classes stay as they are.

A batch of the base alone takes vLLM's own path. A batch of one variant takes the lean path: as many
columns as that variant has active experts, so fewer experts cost less. A mixed batch has as many
columns as its greediest variant, and the base's tokens keep vLLM's own result. Under CUDA graphs
nothing may depend on the batch: every path is computed, and the token's slot picks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from liveprune.patches.batch_slots import BatchSlots
from liveprune.patches.live_types import BASE_SLOT
from liveprune.patches.routing import RouterSpec, route, split_constants
from liveprune.patches.routing_tables import LayerTables
from liveprune.pruning.errors import EngineError

Routing = tuple[torch.Tensor, torch.Tensor]
Record = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Of hidden states, weights and rows; rows that name constants are still among them."""


class LiveRouting:
    """Stands in for ``_compute_routing`` of one router.

    Attributes:
        original: vLLM's own.
        spec: how it scores and selects.
        tables: of the layer; None until attached, and then routing is vLLM's own.
        batch: slots of the running batch; None until attached.
        constants: float32 [tokens, hidden], what constant experts add to the output of the tokens
            routed last; None if none of them has any.
        record: called with what was routed; None: nobody counts.
    """

    def __init__(self, original: Callable[..., Routing], spec: RouterSpec) -> None:
        self.original = original
        self.spec = spec
        self.tables: LayerTables | None = None
        self.batch: BatchSlots | None = None
        self.constants: torch.Tensor | None = None
        self.record: Record | None = None
        self._route = route

    def attach(self, tables: LayerTables, batch: BatchSlots) -> None:
        """Route by tables from here on."""
        self.tables, self.batch = tables, batch
        if batch.static and batch.slots.is_cuda:
            self._route = _fused_route()

    def __call__(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> Routing:
        """As vLLM's; the ids are rows of the expert tensor.

        Returns:
            weights float32 [tokens, columns] and rows [tokens, columns], ``indices_type`` or int32.

        Raises:
            EngineError: a token's slot is free (not seen under CUDA graphs).
        """
        tables, batch = self.tables, self.batch
        self.constants = None
        if tables is None or batch is None:
            return self.original(hidden_states, router_logits, indices_type, input_ids=input_ids)
        tokens = len(router_logits)
        slots: torch.Tensor | int
        if batch.static:
            base, slots, columns = True, batch.view(tokens), tables.base_top_k
            constant = tables.can_be_constant
            flags = {"mapped": tables.can_map, "remapped": tables.can_remap, "lower": True}
        else:
            present = batch.present_in(tokens)
            top_ks = [tables.top_ks[slot] for slot in present]
            if 0 in top_ks:
                free = [slot for slot in present if not tables.top_ks[slot]]
                raise EngineError(f"found tokens of the slots {free}, expected live slots only")
            base, columns = BASE_SLOT in present, max(top_ks)
            slots = batch.view(tokens) if len(present) > 1 else present[0]
            constant = any(tables.constant[slot] for slot in present)
            flags = {
                "mapped": any(tables.mapped[slot] for slot in present),
                "remapped": any(tables.remapped[slot] for slot in present),
                "lower": min(top_ks) < columns,
            }
        if not base:
            weights, rows = self._route(router_logits, self.spec, tables, slots, columns, **flags)
            if self.record is not None:
                self.record(hidden_states, weights, rows)
            if constant:
                weights, rows = self._take_constants(weights, rows, slots, tables)
            return weights, rows.to(indices_type or torch.int32)
        own_weights, own_ids = self.original(
            hidden_states, router_logits, indices_type, input_ids=input_ids
        )
        if isinstance(slots, int):
            if self.record is not None:
                self.record(hidden_states, own_weights, own_ids)
            return own_weights, own_ids
        weights, rows = self._route(router_logits, self.spec, tables, slots, columns, **flags)
        # The base's tokens keep vLLM's own numbers, bit for bit.
        is_base = (slots == BASE_SLOT).unsqueeze(1)
        weights = torch.where(is_base, own_weights, weights)
        rows = torch.where(is_base, own_ids, rows)
        if self.record is not None:
            self.record(hidden_states, weights, rows)
        if constant:
            weights, rows = self._take_constants(weights, rows, slots, tables)
        return weights, rows.to(indices_type or torch.int32)

    def _take_constants(
        self, weights: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor | int, t: LayerTables
    ) -> Routing:
        """Keep what constant experts answer; the kernel sees rows that are there."""
        self.constants, weights, rows = split_constants(weights, rows, slots, t)
        return weights, rows


@functools.cache
def _fused_route() -> Callable[..., Routing]:
    """``route`` with its many small kernels fused, as vLLM does with its grouped top-k.

    One for all layers: they differ in the tensors only, which are arguments.
    """
    from vllm.model_executor.utils import maybe_disable_graph_partition
    from vllm.platforms import current_platform

    backend = current_platform.simple_compile_backend
    options = maybe_disable_graph_partition(backend)
    return torch.compile(route, dynamic=True, backend=backend, options=options)


def install(router: Any, spec: RouterSpec) -> LiveRouting:
    """Put a ``LiveRouting`` in the place of ``router._compute_routing``, and return it."""
    routing = LiveRouting(router._compute_routing, spec)  # noqa: SLF001 - vLLM's subclass hook
    router._compute_routing = routing  # noqa: SLF001
    return routing
