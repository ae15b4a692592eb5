"""Groups of experts that become one: who owns whom, and the plan of a layer that says so.

A group is known by its owner, the member that the others join. ``owners`` are [experts] int64: the
owner of each expert; an owner owns itself. New experts stand in the order of their owners.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from liveprune.pruning.alignment import Order
from liveprune.pruning.budget import LayerBudget
from liveprune.pruning.errors import PlanError
from liveprune.pruning.layer_plan import LayerPlan

Owners = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


def cosines(products: Values) -> Values:
    """[n, n] cosines of vectors of which these are the dot products; with a zero vector, 0."""
    lengths = np.sqrt(np.diag(products))
    scale = np.outer(lengths, lengths)
    return np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)


def shares(owners: Owners, counts: Values) -> Values:
    """[experts]: what each counts in its group's mean: the tokens that it received.

    In a group that no token reached all count the same.
    """
    total = np.bincount(owners, counts, minlength=len(owners))
    return np.where(total[owners] > 0, counts, 1.0)


def new_ids(owners: Owners) -> Owners:
    """[experts]: the new expert that each becomes part of."""
    return np.searchsorted(np.unique(owners), owners)


def routing(owners: Owners, *, keep_gate_rows: bool) -> Mapping[str, Any]:
    """The fields of ``LayerPlan`` that say how tokens reach the new experts."""
    if keep_gate_rows:
        return {"expert_map": tuple(new_ids(owners).tolist())}
    return {"kept": tuple(np.unique(owners).tolist())}


def aligned_layer(
    budget: LayerBudget,
    owners: Owners,
    orders: Mapping[int, Order],
    weights: Values,
    *,
    keep_gate_rows: bool,
) -> LayerPlan:
    """A layer whose groups are averaged neuron by neuron.

    Args:
        budget: of the layer.
        owners: at least one expert is not its own.
        orders: by expert that is not its own owner: how its neurons fit the owner's.
        weights: [experts]: what each counts in its group.
        keep_gate_rows: see ``Folding``.
    """
    ffn = len(next(iter(orders.values())))
    as_it_is = np.arange(ffn, dtype=np.int32)
    places = np.stack([orders.get(i, as_it_is) for i in range(len(owners))])
    starts = (new_ids(owners) * ffn).astype(np.int32)
    return LayerPlan(
        layer=budget.layer.index,
        experts=budget.layer.experts,
        top_k=budget.top_k,
        neuron_map=starts[:, None] + places,
        neuron_shares=weights.astype(np.float32),
        **routing(owners, keep_gate_rows=keep_gate_rows),
    )


def only_protected(layer: int, protected: Sequence[int]) -> PlanError:
    """The error of a layer in which nobody is left to take the others in."""
    return PlanError(
        f"layer {layer}: keeps only its super experts {list(protected)}, which stay as they are; "
        f"expected at least one more, that the others can be merged into"
    )
