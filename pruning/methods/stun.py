"""STUN, stage 1: experts whose gate rows lie close together are taken for one.

arXiv:2409.06211 (methods.md 7.4). The closest pair of experts joins its clusters, as long as no two
experts of the joined cluster are farther apart than a threshold; one threshold holds for all
layers. A cluster is then represented by the expert nearest to the mean of its weights. A layer left
with few clusters averages the weights of each instead.

Three things differ from the published code: the number of experts that stay is exact (joins end
when it is reached; there a threshold is searched that comes close), no layer falls below what it
can be served with, and where weights are averaged the gate keeps the representative's row, not the
mean of the rows, which a plan cannot say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from liveprune.pruning.errors import PlanError
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.methods.method import Choosing, Chosen, Method
from liveprune.pruning.methods.stun_clusters import Join, clusters, cut, joins_at, smallest

if TYPE_CHECKING:
    from liveprune.pruning.budget import LayerBudget
    from liveprune.pruning.calibration.weights import LayerWeights

Matrix = npt.NDArray[np.float64]


def _choose(task: Choosing) -> Chosen:
    if task.spec.router.groups > 1:
        raise PlanError(
            f"method stun: this router picks among {task.spec.router.groups} groups, which must "
            f"keep the same number of experts; expected a router without groups"
        )
    open_layers = [b for b in task.budgets if not b.skipped]
    distances = {b.layer.index: _distances(task, b.layer.index) for b in open_layers}
    floors = {b.layer.index: b.floor for b in open_layers}
    if task.total is not None:
        removals = sum(b.layer.experts for b in open_layers) - task.total
        joined = _joins(distances, floors, removals)
    else:
        joined = {}
        for b in open_layers:
            index = b.layer.index
            alone = {index: distances[index]}
            joined |= _joins(alone, {index: b.keep}, b.layer.experts - b.keep)
    layers = {
        b.layer.index: _layer(b, joined[b.layer.index], task.weights.layers[b.layer.index], task)
        for b in open_layers
    }
    scores = {
        str(index): [[join.first, join.second, join.distance] for join in joins]
        for index, joins in joined.items()
    }
    return Chosen(layers, {"joins": scores})


def _distances(task: Choosing, index: int) -> Matrix:
    """[experts, experts] float64: of the gate rows, less how often both are chosen."""
    rows = task.weights.layers[index].gate().double()
    if task.options["normalise"]:
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    found: Matrix = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    if task.statistics is not None:
        together = task.statistics.layers[index].gathered("together")
        found = found - task.options["coactivation"] * together / task.statistics.tokens
    return found


def _joins(
    distances: Mapping[int, Matrix], floors: Mapping[int, int], removals: int
) -> dict[int, list[Join]]:
    """Of each layer; ``removals`` in all, at the smallest threshold that gives as many."""
    threshold = smallest(distances, floors, removals)
    return cut({i: joins_at(x, threshold, floors[i]) for i, x in distances.items()}, removals)


def _layer(
    budget: LayerBudget, joins: Sequence[Join], weights: LayerWeights, task: Choosing
) -> LayerPlan:
    experts = budget.layer.experts
    groups = clusters(experts, joins)
    kept = {_representative(group, weights): group for group in groups}
    merge = None
    if joins and len(groups) <= task.options["average_up_to"]:
        merge = np.zeros((len(kept), experts), np.float32)
        for row, representative in enumerate(sorted(kept)):
            group = kept[representative]
            merge[row, group] = 1 / len(group)
    return LayerPlan(budget.layer.index, experts, budget.top_k, tuple(sorted(kept)), merge)


def _representative(group: Sequence[int], weights: LayerWeights) -> int:
    """Of a cluster, the expert nearest to its mean; of equal ones the first.

    Holds the mean and one expert, in float32, and reads the layer twice.
    """
    if len(group) <= 2:  # two are equally near
        return group[0]
    total = None
    for _, flat in _flat(group, weights):
        total = flat if total is None else total.add_(flat)
    if total is None:
        raise ValueError("a cluster without experts")
    mean = total / len(group)
    found = [(float((flat - mean).double().square().sum()), i) for i, flat in _flat(group, weights)]
    return min(found)[1]


def _flat(group: Sequence[int], weights: LayerWeights) -> Iterator[tuple[int, torch.Tensor]]:
    for i in group:
        gate_up, down = weights.expert(i)
        yield i, torch.cat([gate_up.float().flatten(), down.float().flatten()])


_FORMULA = "d_ij = ||W_G[i] - W_G[j]||_2; clusters no wider than one threshold keep one expert each"

STUN = Method(
    name="stun",
    title="Clusters of gate rows (STUN, stage 1)",
    reference="arXiv:2409.06211",
    formula=_FORMULA,
    choose=_choose,
    allocate="global",
    options={"normalise": False, "average_up_to": 3, "coactivation": 0.0},
)
STUN_COACTIVATION = Method(
    name="stun-coactivation",
    title="Clusters of gate rows and of experts chosen together (STUN, stage 1)",
    reference="arXiv:2409.06211",
    formula="d_ij = ||W_G[i] - W_G[j]||_2 - coactivation * share of tokens routed to both",
    choose=_choose,
    allocate="global",
    needs=frozenset({"logits"}),
    options={"normalise": False, "average_up_to": 3, "coactivation": 1.0},
)
