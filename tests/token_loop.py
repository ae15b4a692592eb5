"""The independent reference for plans of every form: token by token, expert by expert, in float64.

Shares no code with the library, and neither the gates nor the experts of transformers.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liveprune.pruning.model_spec import ModelSpec, Router
from liveprune.pruning.plan import LayerPlan, Plan
from tests import reference

Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Gate and up [ffn, hidden], down [hidden, ffn]."""


def looped_model(base: Path, plan: Plan) -> Any:
    """The base model in float64, its blocks replaced by loops that carry out ``plan``."""
    model = reference.load(base).double()
    spec = ModelSpec.from_path(base)
    for layer in plan.layers:
        block = model.model.layers[layer.layer].mlp
        block.loop = _Loop(block, layer, spec.router)
        block.forward = types.MethodType(_forward, block)
    return model


def new_experts(old: list[Expert], layer: LayerPlan) -> list[Expert]:
    """The experts after the plan, in the dtype of ``old``, one neuron after the other."""
    if layer.merge is not None:
        return [
            tuple(sum(float(c) * e[m] for c, e in zip(row, old, strict=True)) for m in range(3))  # type: ignore[misc]
            for row in layer.merge
        ]
    if layer.neuron_map is None or layer.neuron_shares is None:
        return [old[i] for i in layer.kept]
    count, size = layer.kept_experts, layer.neuron_map.shape[1]
    sums = [tuple(torch.zeros_like(x) for x in old[0]) for _ in range(count)]
    total = np.zeros(count * size)
    for i, row in enumerate(layer.neuron_map):
        share = float(layer.neuron_shares[i])
        for n, target in enumerate(row):
            if target < 0:
                continue
            (gate, up, down), m = sums[target // size], target % size
            gate[m] += share * old[i][0][n]
            up[m] += share * old[i][1][n]
            down[:, m] += share * old[i][2][:, n]
            total[target] += share
    made = []
    for j, (gate, up, down) in enumerate(sums):
        of_j = torch.from_numpy(total[j * size : (j + 1) * size])
        made.append((gate / of_j[:, None], up / of_j[:, None], down / of_j))
    return made


class _Loop:
    def __init__(self, block: Any, layer: LayerPlan, router: Router) -> None:
        pairs = zip(block.experts.gate_up_proj.data, block.experts.down_proj.data, strict=True)
        old = [(*gate_up.chunk(2), down) for gate_up, down in pairs]
        self.experts = new_experts(old, layer)
        self.layer, self.router = layer, router
        self.act = block.experts.act_fn
        self.gate = block.gate.weight.data
        self.bias = getattr(block.gate, "e_score_correction_bias", torch.zeros(len(self.gate)))
        self.ids = list(range(layer.experts))
        if not (layer.expert_map or layer.constants is not None):
            self.gate, self.ids = self.gate[list(layer.kept)], list(range(len(layer.kept)))
            self.bias = self.bias[list(layer.kept)]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """One token."""
        logits = self.gate @ x
        scores = logits.softmax(0) if self.router.scoring == "softmax" else logits.sigmoid()
        chosen = self._choose([float(s + b) for s, b in zip(scores, self.bias, strict=True)])
        weights = {i: float(scores[i]) for i in chosen}
        total = sum(weights.values()) if self.router.renormalise else 1.0
        output = torch.zeros_like(x)
        for i, weight in weights.items():
            output += weight / total * self.router.scale * self._answer(i, x)
        return output

    def _choose(self, scores: list[float]) -> list[int]:
        size = len(scores) // self.router.groups
        groups = [list(range(g * size, (g + 1) * size)) for g in range(self.router.groups)]
        best = self.router.group_top

        def worth(group: list[int]) -> float:
            return sum(sorted((scores[i] for i in group), reverse=True)[:best])

        open_groups = sorted(groups, key=worth, reverse=True)[: self.router.top_groups]
        candidates = [i for group in open_groups for i in group]
        return sorted(candidates, key=lambda i: -scores[i])[: self.layer.top_k]

    def _answer(self, i: int, x: torch.Tensor) -> torch.Tensor:
        if self.layer.constants is not None:
            if i not in self.layer.kept:
                place = [j for j in range(self.layer.experts) if j not in self.layer.kept].index(i)
                return torch.tensor(self.layer.constants[place]).double()
            new = self.layer.kept.index(i)
        else:
            new = self.layer.expert_map[i] if self.layer.expert_map else i
        gate, up, down = self.experts[new]
        answer: torch.Tensor = down @ (self.act(gate @ x) * (up @ x))
        return answer


def _forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    routed = torch.stack([self.loop(x) for x in flat]).view_as(hidden)
    if hasattr(self, "shared_experts"):
        return routed + self.shared_experts(hidden)
    if hasattr(self, "shared_expert"):
        return routed + self.shared_expert_gate(hidden).sigmoid() * self.shared_expert(hidden)
    return routed
