"""DERN: the neurons of rarely used experts go, one by one, to the neurons that they resemble.

arXiv:2509.10377, of which a summary was read (methods.md 6.5). Experts with a low router statistic
are pruned. Each of their neurons joins the most similar neuron of any expert that stays, by cosine
of gate row, up row and down column as one vector; experts keep their size.

Not stated in what was read [U], and chosen here: the statistic is the routing frequency, which also
weights the means, an expert that no token reached counting as reached by one; a neuron stays out
unless its cosine is above ``threshold``. At a half, two neurons of one length are as far from each
other as each is from nothing: below it, what stays stands for what goes worse than nothing would.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from liveprune.pruning.alignment import Expert, lengths, products
from liveprune.pruning.errors import PlanError
from liveprune.pruning.layer_plan import LayerPlan, NeuronMap
from liveprune.pruning.methods.method import Folding, Method, Options

Values = npt.NDArray[np.float64]


def _fold(task: Folding) -> LayerPlan:
    """In memory are the experts that stay, one that goes, and 16 * ffn^2 bytes."""
    layer = task.budget.layer
    places = {i: place for place, i in enumerate(task.kept)}
    takers = {places[i]: task.weights.expert(i) for i in task.kept if i not in task.protected}
    norms = {place: lengths(expert) for place, expert in takers.items()}
    ffn = task.weights.expert(task.kept[0])[1].shape[1]
    neuron_map = np.full((layer.experts, ffn), -1, np.int32)
    for i, place in places.items():
        neuron_map[i] = place * ffn + np.arange(ffn)
    for i in sorted(set(range(layer.experts)) - set(task.kept)):
        neuron_map[i] = _targets(task.weights.expert(i), takers, norms, task.options["threshold"])
    return LayerPlan(
        layer=layer.index,
        experts=layer.experts,
        top_k=task.budget.top_k,
        kept=task.kept,
        neuron_map=neuron_map,
        neuron_shares=np.maximum(task.calibrated.counts, 1.0).astype(np.float32),
    )


def _targets(
    expert: Expert,
    takers: Mapping[int, Expert],
    norms: Mapping[int, Values],
    threshold: float,
) -> NeuronMap:
    """[ffn]: where each neuron goes, or -1; of equally similar neurons to the first."""
    own = lengths(expert)
    ffn = len(own)
    found = np.full(ffn, -1, np.int32)
    best = np.full(ffn, threshold)
    for place, taker in takers.items():
        scale = np.outer(own, norms[place])
        cosines = products(expert, taker)
        np.divide(cosines, scale, out=cosines, where=scale > 0)
        nearest = cosines.argmax(axis=1)
        highest = cosines[np.arange(ffn), nearest]
        closer = highest > best
        found[closer] = place * ffn + nearest[closer]
        best[closer] = highest[closer]
    return found


def _check(options: Options) -> None:
    if not -1 <= options["threshold"] <= 1:
        raise PlanError(
            f"method dern: threshold is {options['threshold']}, expected a cosine, -1 to 1"
        )


DERN = Method(
    name="dern",
    title="Neurons of pruned experts join those they resemble (DERN)",
    reference="arXiv:2509.10377",
    formula="S_j = n_j; neurons of the pruned join the nearest by cosine, averaged by n_j",
    from_statistics=lambda layer: layer.saliency(0, 0, 0),
    fold=_fold,
    options={"threshold": 0.5},
    check=_check,
)
