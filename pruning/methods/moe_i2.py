"""MoE-I2, stage 1: layers that the loss needs less lose more; sets are bred, then tried in a row.

arXiv:2411.01016 (methods.md, 7.3). The paper was read at second hand and its repository was not to
be had: what is unverified is said in ``moe_i2_counts``, ``moe_i2_sets`` and ``moe_i2_blocks``. Its
stages 2 and 3, low-rank experts and LoRA, change and train weights; they are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from liveprune.pruning.budget import LayerBudget
from liveprune.pruning.calibration.layer_outputs import observe_outputs
from liveprune.pruning.calibration.rows import Batch, Rows
from liveprune.pruning.calibration.streamed import StreamedModel
from liveprune.pruning.errors import PlanError
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.methods.expert_sets import SetRanking, SetSpace
from liveprune.pruning.methods.method import Choosing, Chosen, Method
from liveprune.pruning.methods.moe_i2_blocks import choose_block
from liveprune.pruning.methods.moe_i2_counts import (
    Values,
    expert_losses,
    load_engine,
    removal_counts,
)
from liveprune.pruning.methods.moe_i2_sets import Breeding, search_sets

OPTIONS: Mapping[str, Any] = MappingProxyType(
    {"population": 100, "generations": 50, "mutation": 0.5, "sets": 3, "block": 2}
)
"""``sets`` (K) of each layer are left after the search, of ``block`` (T) layers with experts in a
row all combinations are tried. ``population`` and ``generations`` are the paper's, the others
ours."""


@torch.inference_mode()
def _choose(task: Choosing) -> Chosen:
    _check(task)
    if task.rows is None:
        raise ValueError("moe-i2: found no rows, expected those it asks for")
    stream = StreamedModel(task.model, task.spec, task.device)
    last = max((b.layer.index for b in task.budgets if not b.skipped), default=-1)
    budgets = [b for b in task.budgets if b.layer.index <= last]
    size = task.options["block"]
    blocks = [budgets[i : i + size] for i in range(0, len(budgets), size)]
    measured = [] if task.total is None else [b for b in budgets if not b.skipped]
    step = _steps(task.progress, len(measured) + len(budgets) + len(blocks))
    scores: dict[str, Any] = {}
    counts = {b.layer.index: b.keep for b in budgets}
    if task.total is not None:
        importance = _importance(task, task.rows, measured, stream.dtype, step)
        scores["importance"] = {str(i): values.tolist() for i, values in importance.items()}
        counts |= share_out(measured, importance, task.total)
    walk = _Walk(task, stream, task.rows.batches(), step)
    layers: dict[int, LayerPlan] = {}
    for block in blocks:
        chosen, facts = walk.block([replace(b, keep=counts[b.layer.index]) for b in block])
        layers |= {plan.layer: plan for plan in chosen}
        scores |= facts
    return Chosen(layers, scores)


def _importance(
    task: Choosing,
    rows: Rows,
    measured: Sequence[LayerBudget],
    dtype: torch.dtype,
    step: Callable[[], None],
) -> dict[int, Values]:
    """Losses by layer; the whole model is in memory only meanwhile."""
    name = str(dtype).removeprefix("torch.")
    engine = load_engine(task.model, rows, device=task.device, dtype=name)
    return expert_losses(engine, task.spec, rows, [b.layer for b in measured], step)


def share_out(
    budgets: Sequence[LayerBudget], importance: Mapping[int, Values], total: int
) -> dict[int, int]:
    """Experts kept by layer index, ``total`` in all; a layer's importance is the sum of its
    experts'.
    """
    caps = {b.layer.index: b.layer.experts - b.floor for b in budgets}
    removed = removal_counts(
        {i: float(values.sum()) for i, values in importance.items()},
        caps,
        sum(b.layer.experts for b in budgets) - total,
    )
    return {b.layer.index: b.layer.experts - removed[b.layer.index] for b in budgets}


class _Walk:
    """The base model's hidden states on their way through it, a block of layers at a time."""

    def __init__(
        self,
        task: Choosing,
        stream: StreamedModel,
        batches: Sequence[Batch],
        step: Callable[[], None],
    ) -> None:
        self._task = task
        self._stream = stream
        self._batches = batches
        self._step = step
        self._masks = [torch.from_numpy(batch.attention_mask) for batch in batches]
        self._hidden = stream.embed([torch.from_numpy(batch.input_ids) for batch in batches])
        self._next = 0

    def block(self, budgets: Sequence[LayerBudget]) -> tuple[Sequence[LayerPlan], dict[str, Any]]:
        """The layers' plans, and what the lineage says of them.

        Twice the hidden states of all rows are in memory.
        """
        facts: dict[str, Any] = {}
        while self._next < budgets[0].layer.index:
            self._pass_through(self._next)
        before = list(self._hidden)
        candidates = []
        for budget in budgets:
            index = budget.layer.index
            while self._next < index:
                self._pass_through(self._next)
            if budget.keep == budget.layer.experts:
                self._pass_through(index)
                sets = [tuple(range(budget.layer.experts))]
            else:
                ranking = self._search(budget)
                sets = [x.kept for x in ranking.best]
                facts[str(index)] = _to_json(ranking)
            candidates.append(
                [LayerPlan(index, budget.layer.experts, budget.top_k, kept) for kept in sets]
            )
            self._step()
        chosen: Sequence[LayerPlan] = [plans[0] for plans in candidates]
        if any(len(plans) > 1 for plans in candidates):
            found = choose_block(self._stream, candidates, self._masks, before, self._hidden)
            chosen = found.layers
            facts[f"{chosen[0].layer}-{chosen[-1].layer}"] = {
                "combinations": found.tried,
                "loss": found.loss,
            }
        self._step()
        return chosen, facts

    def _pass_through(self, index: int) -> None:
        with self._stream.layer(index):
            self._hidden = [
                self._stream.advance(x, mask, index)
                for x, mask in zip(self._hidden, self._masks, strict=True)
            ]
        self._next = index + 1

    def _search(self, budget: LayerBudget) -> SetRanking:
        options, moe = self._task.options, budget.layer
        with self._stream.layer(moe.index) as layer:
            outputs = observe_outputs(self._stream, layer, moe, self._batches, self._hidden)
        self._next = moe.index + 1
        return search_sets(
            lambda kept: outputs.losses(kept, budget.top_k),
            SetSpace(moe.experts, budget.keep, outputs.router.groups),
            options["sets"],
            Breeding(options["population"], options["generations"], options["mutation"]),
            np.random.default_rng([self._task.seed, moe.index]),
        )


def _check(task: Choosing) -> None:
    least = {"population": 2, "generations": 0, "sets": 1, "block": 1}
    for name, bound in least.items():
        if task.options[name] < bound:
            raise PlanError(
                f"method moe-i2: {name} is {task.options[name]}, expected at least {bound}"
            )
    if not 0 <= task.options["mutation"] <= 1:
        raise PlanError(
            f"method moe-i2: mutation is {task.options['mutation']}, expected a probability"
        )
    if task.total is not None and task.spec.router.groups > 1:
        raise PlanError(
            f"method moe-i2: allocate is 'global', expected 'uniform' or a list of counts: this "
            f"router picks among {task.spec.router.groups} groups, which cannot miss one expert"
        )


def _steps(progress: Callable[[int, int], None] | None, total: int) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return step


def _to_json(ranking: SetRanking) -> dict[str, Any]:
    best = [{"kept": list(x.kept), "loss": x.loss} for x in ranking.best]
    return {"sets": ranking.tried, "best": best}


MOE_I2 = Method(
    name="moe-i2",
    title="Layer importance, genetic search and block-wise choice (MoE-I2, stage 1)",
    reference="arXiv:2411.01016",
    formula="I_ij = loss without expert j of layer i; layer i loses experts ~ 1 / sum_j I_ij",
    choose=_choose,
    draws=True,
    reads_rows=True,
    allocate="global",
    options=OPTIONS,
)
