"""Route each token by its own variant: the arithmetic, without state.

Equal to routing with the other experts physically removed (methods.md 1.2, operation a): they take
no part in the softmax and cannot be selected, whatever the logits are. Shapes depend on the number
of tokens and ``top_k`` alone, and nothing branches on data, so CUDA graphs can capture it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from liveprune.patches.routing_tables import LayerTables
from liveprune.pruning.errors import ArchitectureError
from liveprune.pruning.plan import SMALLEST_SUM

_REFUSED = (
    "custom_routing_function",
    "zero_expert_type",
    "hash_indices_table",
    "bias_vl",
    "num_fused_shared_experts",
)
"""Arguments of vLLM's router that change the selection in ways the tables do not know."""


@dataclass(frozen=True, eq=False)
class RouterSpec:
    """How vLLM's own router of a layer scores and selects."""

    scoring: str
    """``softmax`` or ``sigmoid``."""
    renormalise: bool
    """The selected weights are divided by their sum."""
    grouped: bool = False
    """vLLM's grouped formula, which scores first and in float32; also with a single group."""
    groups: int = 1
    """Equal runs of experts, of which a token may use ``top_groups``."""
    top_groups: int = 1
    correction_bias: torch.Tensor | None = None
    """[experts]; added to scores to select by, not to weights."""
    scale: float = 1.0
    """Factor on the weights; 1 where vLLM's own router does not apply it."""

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> RouterSpec:
        """Read the keyword arguments of vLLM's ``create_fused_moe_router``.

        Raises:
            ArchitectureError: naming the argument that live variants cannot route with.
        """
        for name in _REFUSED:
            value = arguments.get(name)
            if value is not None and not (isinstance(value, int) and value == 0):
                raise ArchitectureError(f"router: found {name}, expected none in a live model")
        scoring = arguments.get("scoring_func", "softmax")
        grouped = bool(arguments.get("use_grouped_topk"))
        bias = arguments.get("e_score_correction_bias")
        if scoring not in ("softmax", "sigmoid"):
            raise ArchitectureError(
                f"router: scoring_func is {scoring!r}, expected 'softmax' or 'sigmoid'"
            )
        if bias is not None and not grouped:
            # vLLM's CPU router leaves the bias out here, its CUDA routers do not.
            raise ArchitectureError(
                "router: found e_score_correction_bias, expected it with use_grouped_topk only"
            )
        return cls(
            scoring=scoring,
            renormalise=arguments.get("renormalize", True),
            grouped=grouped,
            groups=arguments["num_expert_group"] if grouped else 1,
            top_groups=arguments["topk_group"] if grouped else 1,
            correction_bias=bias,
            scale=arguments.get("routed_scaling_factor", 1.0) if grouped else 1.0,
        )


def route(
    logits: torch.Tensor,
    spec: RouterSpec,
    tables: LayerTables,
    slots: torch.Tensor | int,
    top_k: int,
    *,
    mapped: bool,
    remapped: bool,
    lower: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select rows for each token by its slot.

    A token whose slot has a lower top-k gets weight 0 in its last columns, and there the row
    of its first.

    Args:
        logits: [tokens, gate width], any float dtype.
        spec: of the layer.
        tables: of the layer.
        slots: int64 [tokens], or one slot for all. All of them live.
        top_k: columns; at least the top-k of every slot, at most the base's.
        mapped: some slot may select by the router map.
        remapped: some slot may have experts' work done by other rows.
        lower: some slot may have a lower top-k than ``top_k``.

    Returns:
        weights float32 [tokens, top_k] and rows int32 [tokens, top_k], contiguous, the greatest
        score first.
    """
    if not lower:
        dropped = None
    elif isinstance(slots, int):
        dropped = tables.ranks[:top_k] >= tables.top_ks[slots]
    else:
        dropped = tables.ranks[:top_k] >= tables.top_k.index_select(0, slots).unsqueeze(1)
    if tables.has_base_map or (mapped and isinstance(slots, int)):
        weights, rows = _by_map(logits, spec, tables, slots, top_k, dropped)
    else:
        weights, rows = _by_own_score(
            logits, spec, tables, slots, top_k, dropped, remapped=remapped
        )
        if mapped and not isinstance(slots, int):
            by_map = tables.is_mapped.index_select(0, slots).unsqueeze(1)
            map_weights, map_rows = _by_map(logits, spec, tables, slots, top_k, dropped)
            weights = torch.where(by_map, map_weights, weights)
            rows = torch.where(by_map, map_rows, rows)
    return weights.contiguous(), rows.to(torch.int32)


def split_constants(
    weights: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor | int, tables: LayerTables
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take the choices of constant experts out of a routing.

    Args:
        weights: [tokens, top_k].
        rows: [tokens, top_k]; from ``tables.rows`` on they name constants.
        slots: int64 [tokens], or one slot for all.
        tables: of the layer.

    Returns:
        The sum over a token's constants of weight times vector, float32 [tokens, hidden]; and
        weights and rows for the kernel, with weight 0 and the slot's stand-in in their place.
    """
    is_constant = rows >= tables.rows
    mass = weights.new_zeros(len(rows), len(tables.constants), dtype=torch.float32)
    places = torch.where(is_constant, rows - tables.rows, 0).long()
    mass.scatter_add_(1, places, weights.float() * is_constant)
    if isinstance(slots, int):
        stand_in = tables.stand_in[slots]
    else:
        stand_in = tables.stand_in.index_select(0, slots).unsqueeze(1)
    kernel_rows = torch.where(is_constant, stand_in.to(rows.dtype), rows)
    return mass @ tables.constants, weights.masked_fill(is_constant, 0.0), kernel_rows


def _by_own_score(
    logits: torch.Tensor,
    spec: RouterSpec,
    tables: LayerTables,
    slots: torch.Tensor | int,
    top_k: int,
    dropped: torch.Tensor | None,
    *,
    remapped: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(slots, int):
        allow = tables.allow_rows[slots]
    else:
        allow = tables.allow.index_select(0, slots)
    select = _scored if spec.grouped or spec.scoring != "softmax" else _plain
    weights, ids = select(logits, spec, allow, tables.nowhere, top_k, dropped)
    ids = _first_if_dropped(ids, dropped)
    if not remapped:
        return weights, ids
    if isinstance(slots, int):
        return weights, tables.row_of_rows[slots].take(ids)
    return weights, tables.row_of.index_select(0, slots).gather(1, ids)


def _plain(
    logits: torch.Tensor,
    spec: RouterSpec,
    allow: torch.Tensor,
    nowhere: torch.Tensor,
    top_k: int,
    dropped: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax and top-k by the formula of vLLM's CPU router, in its dtypes."""
    if not logits.is_cpu:
        logits = logits.float()  # as vLLM's CUDA kernel does inside
    logits = _allowed(logits, allow, nowhere)
    values, ids = torch.topk(logits, top_k, dim=-1)
    if spec.renormalise:
        if dropped is not None:
            values = torch.where(dropped, nowhere, values)
        weights = torch.softmax(values, dim=-1)
    else:
        weights = (values - torch.logsumexp(logits, dim=-1, keepdim=True)).exp()
        weights = _zero_if_dropped(weights, dropped)
    return weights.float(), ids


def _scored(
    logits: torch.Tensor,
    spec: RouterSpec,
    allow: torch.Tensor,
    nowhere: torch.Tensor,
    top_k: int,
    dropped: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores first, then groups and top-k, as DeepSeek-V2 and V3 do."""
    logits = logits.float()
    if spec.scoring == "softmax":
        scores = torch.softmax(_allowed(logits, allow, nowhere), dim=-1)
    else:
        scores = logits.sigmoid()
    choice = scores if spec.correction_bias is None else scores + spec.correction_bias
    # After scoring: a bias must not lift an expert that is not there, nor underflow tie with it.
    choice = torch.where(allow, choice, nowhere)
    if spec.top_groups < spec.groups:
        choice = _in_best_groups(choice, spec, nowhere)
    weights, ids = torch.topk(choice, top_k, dim=-1)
    if spec.correction_bias is not None:
        weights = scores.gather(1, ids)
    weights = _zero_if_dropped(weights, dropped)
    if spec.renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if spec.scale != 1.0:
        weights = weights * spec.scale
    return weights, ids


def _in_best_groups(choice: torch.Tensor, spec: RouterSpec, nowhere: torch.Tensor) -> torch.Tensor:
    """Rule out the experts of all groups but the best."""
    grouped = choice.view(choice.shape[0], spec.groups, -1)
    if spec.correction_bias is None:
        group_scores = grouped.amax(dim=-1)
    else:
        group_scores = torch.topk(grouped, 2, dim=-1).values.sum(dim=-1)
    best = torch.topk(group_scores, spec.top_groups, dim=-1).indices
    within = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, value=True)
    return torch.where(within.unsqueeze(-1), grouped, nowhere).view_as(choice)


def _by_map(
    logits: torch.Tensor,
    spec: RouterSpec,
    tables: LayerTables,
    slots: torch.Tensor | int,
    top_k: int,
    dropped: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``router_map.route``, over the map rows of the slot."""
    if isinstance(slots, int):
        allow = tables.map_allow_rows[slots]
    else:
        allow = tables.map_allow.index_select(0, slots)
    probabilities = torch.softmax(logits.float(), dim=-1)
    scores = torch.where(allow, probabilities @ tables.router_map.t(), tables.nowhere)
    weights, ids = torch.topk(scores, top_k, dim=-1)
    weights = _zero_if_dropped(weights, dropped)
    if spec.renormalise:
        total = weights.sum(dim=-1, keepdim=True)
        near_zero = total.abs() < SMALLEST_SUM
        weights = weights / torch.where(near_zero, SMALLEST_SUM, total)
    if spec.scale != 1.0:
        weights = weights * spec.scale
    return weights, tables.map_row.take(_first_if_dropped(ids, dropped))


def _allowed(logits: torch.Tensor, allow: torch.Tensor, nowhere: torch.Tensor) -> torch.Tensor:
    # The floor keeps an allowed expert above all others even if its logit overflowed to -inf.
    return torch.where(allow, logits.clamp_min(torch.finfo(logits.dtype).min), nowhere)


def _zero_if_dropped(weights: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    return weights if dropped is None else weights.masked_fill(dropped, 0.0)


def _first_if_dropped(ids: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    return ids if dropped is None else torch.where(dropped, ids[:, :1], ids)
