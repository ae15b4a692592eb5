"""NAEE: keep the set of experts under which a layer's output moves least.

arXiv:2402.14800 (methods.md, section 4). Layers are judged one by one on the base model's hidden
states. The loss of a set is the sum over calibration batches of the Frobenius norm of the change
of the MoE block's output. A batch is one of ``Rows.batches(batch_tokens)``: rows of like length,
at most that many tokens with padding (the paper: 8 rows of 2048). Where a layer has too many sets
to try them all, experts go one by one, each time the one whose loss costs least; that is not in
the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from liveprune.pruning.budget import LayerBudget
from liveprune.pruning.calibration.layer_outputs import LayerOutputs, observe_outputs
from liveprune.pruning.calibration.rows import BATCH_TOKENS
from liveprune.pruning.calibration.streamed import StreamedModel
from liveprune.pruning.errors import PlanError
from liveprune.pruning.evaluation.carried_out import layer_carried_out
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.methods.expert_sets import SetRanking, SetSpace, eliminate, enumerate_sets
from liveprune.pruning.methods.method import Choosing, Chosen, Method, Options

STRATEGIES = ("auto", "enumerate", "greedy")
OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "strategy": "auto",
        "max_sets": 1000,
        "progressive": False,
        "batch_tokens": BATCH_TOKENS,
    }
)
"""``strategy``: ``enumerate`` all sets, ``greedy``: remove one expert after another, or ``auto``:
the first where a layer has at most ``max_sets`` sets. ``progressive``: a layer's inputs come
through the layers pruned so far; the outputs to come close to stay the base model's."""


@torch.inference_mode()
def _choose(task: Choosing) -> Chosen:
    _check(task)
    if task.rows is None:
        raise ValueError("naee: found no rows, expected those it asks for")
    stream = StreamedModel(task.model, task.spec, task.device)
    batches = task.rows.batches(task.options["batch_tokens"])
    hidden = stream.embed([torch.from_numpy(batch.input_ids) for batch in batches])
    masks = [torch.from_numpy(batch.attention_mask) for batch in batches]
    pruned = list(hidden) if task.options["progressive"] else None
    budgets = {b.layer.index: b for b in task.budgets if not b.skipped}
    depth = max(budgets, default=-1) + 1
    layers, scores = {}, {}
    for index in range(depth):
        budget = budgets.get(index)
        with stream.layer(index) as layer:
            if budget is None:
                for states in (hidden, *([pruned] if pruned is not None else [])):
                    states[:] = [
                        stream.advance(x, m, index) for x, m in zip(states, masks, strict=True)
                    ]
            else:
                outputs = observe_outputs(stream, layer, budget.layer, batches, hidden, pruned)
                found = search(outputs, budget, task.options)
                layers[index] = plan = LayerPlan(
                    index, budget.layer.experts, budget.top_k, found.best[0].kept
                )
                scores[str(index)] = _to_json(found)
                if pruned is not None:
                    with layer_carried_out(layer.mlp, task.spec, plan):
                        pruned = [
                            stream.advance(x, m, index) for x, m in zip(pruned, masks, strict=True)
                        ]
        if task.progress is not None:
            task.progress(index + 1, depth)
    return Chosen(layers, scores)


def search(outputs: LayerOutputs, budget: LayerBudget, options: Options) -> SetRanking:
    """The sets of one layer that cost least, two at most."""
    space = SetSpace(budget.layer.experts, budget.keep, outputs.router.groups)
    whole = options["strategy"] != "greedy" and space.count <= options["max_sets"]
    choose = enumerate_sets if whole else eliminate
    return choose(lambda kept: outputs.losses(kept, budget.top_k), space, 2)


def _check(task: Choosing) -> None:
    strategy = task.options["strategy"]
    if task.total is not None:
        raise PlanError(
            "method naee: allocate is 'global', expected 'uniform' or a list of counts: the losses "
            "of sets are compared within a layer"
        )
    if strategy not in STRATEGIES:
        raise PlanError(
            f"method naee: strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}"
        )
    for name in ("max_sets", "batch_tokens"):
        if task.options[name] < 1:
            raise PlanError(f"method naee: {name} is {task.options[name]}, expected at least 1")
    for budget in task.budgets if strategy == "enumerate" else ():
        space = SetSpace(budget.layer.experts, budget.keep, task.spec.router.groups)
        if space.count > task.options["max_sets"]:
            raise PlanError(
                f"method naee: layer {budget.layer.index} has {space.count} sets of {budget.keep} "
                f"experts, expected at most max_sets = {task.options['max_sets']}; strategy "
                f"'greedy' tries fewer"
            )


def _to_json(found: SetRanking) -> dict[str, Any]:
    form: dict[str, Any] = {"loss": found.best[0].loss, "sets": found.tried}
    for second in found.best[1:]:
        form["runner_up"] = {"kept": list(second.kept), "loss": second.loss}
    return form


NAEE = Method(
    name="naee",
    title="Output reconstruction over sets of experts (NAEE)",
    reference="arXiv:2402.14800",
    formula="L(C) = sum over batches of ||Z_C(X) - Z||_F; the set C of least loss stays",
    choose=_choose,
    reads_rows=True,
    options=OPTIONS,
)
