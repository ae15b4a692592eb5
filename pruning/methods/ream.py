"""REAM: the most salient experts take in those that are most like them, layer after layer.

arXiv:2604.04356 (methods.md 6.4). Layers are merged in order, and each is judged by what reaches it
through the merged ones before it. Centroids are the experts with the highest REAP saliency; the few
most salient of them take in the rest (``ream_groups``), whose neurons are put in the order that
fits (``ream_alignment``); a group's mean is weighted by saliency.

Two things that the published code does otherwise than the paper are not repeated: its saliency
multiplies by the gate weight twice, and it averages per batch, where batches without hits count as
zeros. Here it is the mean of g * ||f|| over the tokens that an expert received, however batched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liveprune.pruning.alignment import Order
from liveprune.pruning.allocation import select
from liveprune.pruning.budget import LayerBudget
from liveprune.pruning.calibration.observer import LayerWatch
from liveprune.pruning.calibration.rows import Rows
from liveprune.pruning.calibration.statistics import LayerStatistics
from liveprune.pruning.calibration.streamed import StreamedModel
from liveprune.pruning.errors import PlanError
from liveprune.pruning.evaluation.carried_out import layer_carried_out
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.methods.expert_groups import Owners, aligned_layer
from liveprune.pruning.methods.method import Choosing, Chosen, Method, Options, Scores
from liveprune.pruning.methods.ream_alignment import Centroid, Sampled, sample
from liveprune.pruning.methods.ream_groups import distances, owners, raised


@torch.inference_mode()
def _choose(task: Choosing) -> Chosen:
    """In memory are one layer, its merged experts, the sample, the hidden states of all rows."""
    if task.rows is None:
        raise ValueError("ream: found no rows, expected those it asks for")
    budgets = {b.layer.index: b for b in task.budgets if not b.skipped}
    shrink = [i for i, b in budgets.items() if b.keep < b.layer.experts]
    last = max(shrink, default=-1)
    walk = _Walk(task, task.rows, steps=len(shrink) + last)
    layers: dict[int, LayerPlan] = {}
    saliency: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for index in range(last + 1):
        with walk.stream.layer(index) as layer, ExitStack() as stack:
            budget = budgets.get(index)
            if budget is not None:
                plan = LayerPlan(
                    index, budget.layer.experts, budget.top_k, tuple(range(budget.layer.experts))
                )
                if index in shrink:
                    seen = walk.observe(layer, budget)
                    plan, owned = _merged(task, budget, seen, layer.mlp.experts)
                    saliency[str(index)] = seen.to_json()
                    groups[str(index)] = owned.tolist()
                layers[index] = plan
                # What comes later sees what this layer will be.
                stack.enter_context(layer_carried_out(layer.mlp, task.spec, plan))
            if index < last:
                walk.advance(index)
    return Chosen(layers, {**saliency, "groups": groups})


@dataclass(frozen=True, eq=False)
class _Seen:
    """One layer, run over all rows."""

    statistics: LayerStatistics
    inputs: Tensor
    """[n, hidden], the sampled tokens before the experts."""

    @property
    def saliency(self) -> Scores:
        """REAP's; -inf for an expert that no token reached."""
        return self.statistics.saliency(1, 1, 1)

    def to_json(self) -> list[float | None]:
        return [float(x) if np.isfinite(x) else None for x in self.saliency]


def _merged(
    task: Choosing, budget: LayerBudget, seen: _Seen, experts: Any
) -> tuple[LayerPlan, Owners]:
    """The layer's plan, and the centroid of each expert."""
    index = budget.layer.index
    centroids = select(seen.saliency, budget.keep, task.spec.router, index)
    weights = raised(seen.saliency)
    gated, logits = (seen.statistics.gathered(x) for x in ("gated_sums", "logit_products"))
    owned = owners(distances(gated, logits), weights, centroids, task.options["group_size"])
    orders: dict[int, Order] = {}
    for owner in centroids:
        members = [i for i in np.flatnonzero(owned == owner).tolist() if i != owner]
        if members:
            target = experts.gate_up_proj[owner], experts.down_proj[owner]
            centroid = Centroid(target, seen.inputs, experts.act_fn)
            for i in members:
                orders[i] = centroid.order((experts.gate_up_proj[i], experts.down_proj[i]))
    plan = aligned_layer(budget, owned, orders, weights, keep_gate_rows=task.keep_gate_rows)
    return plan, owned


class _Walk:
    """The hidden states of all rows on their way through the model."""

    def __init__(self, task: Choosing, rows: Rows, *, steps: int) -> None:
        self.stream = StreamedModel(task.model, task.spec, task.device)
        batches = rows.batches()
        self._masks = [torch.from_numpy(batch.attention_mask) for batch in batches]
        self._hidden = self.stream.embed([torch.from_numpy(x.input_ids) for x in batches])
        self._sampled = sample(rows, batches, task.options["align_tokens"])
        self._progress = task.progress
        self._steps = steps * len(batches)
        self._done = 0

    def observe(self, layer: Any, budget: LayerBudget) -> _Seen:
        """Run a layer as it is, and leave the hidden states where they are."""
        watch = LayerWatch(layer, budget.layer.experts, ("outputs", "logits"))
        count = sum(len(x.places) for x in self._sampled)
        like = layer.mlp.experts.down_proj
        inputs = like.new_empty(count, like.shape[1])
        for hidden, mask, sampled in zip(self._hidden, self._masks, self._sampled, strict=True):
            watch.real = mask.reshape(-1).bool()
            with _taking(layer.mlp.experts, sampled, inputs):
                self.stream.advance(hidden, mask, budget.layer.index)
            self._step()
        watch.remove(layer)
        return _Seen(watch.statistics(), inputs)

    def advance(self, index: int) -> None:
        """Take the hidden states through the layer in place."""
        for i, mask in enumerate(self._masks):
            self._hidden[i] = self.stream.advance(self._hidden[i], mask, index)
            self._step()

    def _step(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._steps)


@contextmanager
def _taking(experts: nn.Module, sampled: Sampled, inputs: Tensor) -> Iterator[None]:
    """Put the sampled ones of the tokens that reach ``experts`` into their places."""

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[sampled.places] = args[0][sampled.tokens]

    handle = experts.register_forward_pre_hook(take)
    try:
        yield
    finally:
        handle.remove()


def _check(options: Options) -> None:
    if options["group_size"] < 0 or options["group_size"] == 1:
        raise PlanError(
            f"method ream: group_size is {options['group_size']}, expected at least 2, or 0 for "
            f"the nearest centroid"
        )
    if options["align_tokens"] < 1:
        raise PlanError(
            f"method ream: align_tokens is {options['align_tokens']}, expected at least 1"
        )


REAM = Method(
    name="ream",
    title="Router-weighted expert merging (REAM)",
    reference="arXiv:2604.04356",
    formula="S_j = (1 / n_j) sum_t g_j(t) ||f_j(t)||; the lowest join the most salient, aligned",
    choose=_choose,
    reads_rows=True,
    comparable=False,
    keep_gate_rows=False,
    options=MappingProxyType({"group_size": 16, "align_tokens": 32768}),
    check=_check,
)
