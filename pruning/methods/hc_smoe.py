"""HC-SMoE: experts that put out the same on average are clustered and averaged.

arXiv:2410.08589 (methods.md 6.2). An expert is the mean of its outputs over all tokens, routed to
it or not. Agglomerative clustering by Euclidean distance goes on until as many clusters are left as
experts are to stay; a cluster becomes one expert, its weights averaged by frequency, neurons as
they stand. The published run scripts misspell the name of the clustering and so run k-means from
random starts; this is the hierarchical one that the paper describes.

A router that picks groups of experts first must keep as many gate rows in each. Where the gate
loses rows, each of its groups is therefore clustered on its own; where it keeps them, all experts
are clustered together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import linkage

from liveprune.pruning.errors import PlanError
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.methods.expert_groups import (
    Owners,
    new_ids,
    only_protected,
    routing,
    shares,
)
from liveprune.pruning.methods.method import Folding, Method, Options

LINKAGES = ("average", "single", "complete")
"""Distance of two clusters: the mean, the smallest or the largest of their members'."""


def clusters(points: npt.NDArray[np.float64], keep: int, method: str) -> list[list[int]]:
    """Exactly ``keep`` clusters of the rows of ``points``, each ascending, by their first row.

    The two closest clusters become one until ``keep`` are left; the order is SciPy's.
    """
    count = len(points)
    member = {i: [i] for i in range(count)}
    joins = linkage(points, method)[: count - keep] if keep < count else []
    for step, join in enumerate(joins):
        member[count + step] = member.pop(int(join[0])) + member.pop(int(join[1]))
    return sorted(sorted(rows) for rows in member.values())


def _fold(task: Folding) -> LayerPlan:
    layer = task.budget.layer
    counts = task.calibrated.counts
    owners = _owners(task)
    weights = shares(owners, counts)
    total = np.bincount(owners, weights, minlength=layer.experts)
    merge = np.zeros((len(task.kept), layer.experts))
    merge[new_ids(owners), np.arange(layer.experts)] = weights / total[owners]
    return LayerPlan(
        layer=layer.index,
        experts=layer.experts,
        top_k=task.budget.top_k,
        merge=merge.astype(np.float32),
        **routing(owners, keep_gate_rows=task.keep_gate_rows),
    )


def _owners(task: Folding) -> Owners:
    """Of each cluster the most frequent member; of equal ones the first."""
    layer, counts = task.budget.layer, task.calibrated.counts
    # Sums stand for means: what they are divided by is the same for all.
    sums = task.calibrated.gathered("dense_sums")
    parts = 1 if task.keep_gate_rows else task.router.groups
    owners = np.arange(layer.experts)
    for part in owners.reshape(parts, -1).copy():
        alone = [i for i in part.tolist() if i in task.protected]
        free = np.array([i for i in part.tolist() if i not in task.protected], dtype=np.int64)
        keep = len(task.kept) // parts - len(alone)
        if len(free) and keep < 1:
            raise only_protected(layer.index, task.protected)
        for rows in clusters(sums[free], keep, task.options["linkage"]):
            members = free[rows]
            owners[members] = members[counts[members].argmax()]
    return owners


def _check(options: Options) -> None:
    if options["linkage"] not in LINKAGES:
        raise PlanError(
            f"method hc-smoe: linkage is {options['linkage']!r}, expected one of "
            f"{', '.join(LINKAGES)}"
        )


HC_SMOE = Method(
    name="hc-smoe",
    title="Hierarchical clustering of mean outputs (HC-SMoE)",
    reference="arXiv:2410.08589",
    formula="S_j = n_j for counts; clusters of mean_t f_j(t) over all t, averaged by n_j",
    from_statistics=lambda layer: layer.saliency(0, 0, 0),
    fold=_fold,
    needs=frozenset({"dense"}),
    keep_gate_rows=True,
    options={"linkage": "average"},
    check=_check,
)
