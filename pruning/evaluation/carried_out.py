"""A plan carried out in memory, on the modules of a loaded transformers model, and undone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from liveprune.pruning.evaluation.mapped_experts import MappedExperts
from liveprune.pruning.merged_experts import merged_experts
from liveprune.pruning.model_spec import ModelSpec, Router
from liveprune.pruning.plan import SMALLEST_SUM, LayerPlan, Plan


@contextmanager
def carried_out(model: Any, spec: ModelSpec, plan: Plan | None) -> Iterator[None]:
    """Run ``model``, the stock model of ``spec``, under ``plan``; the full model comes back after.

    Removed experts are sliced off, and their gate rows and side tensors unless the layer's form
    keeps them. Merged experts are sums in float32, rounded to the model's dtype.
    """
    with ExitStack() as stack:
        for layer in plan.layers if plan is not None else ():
            block = model.model.layers[layer.layer].mlp
            stack.enter_context(layer_carried_out(block, spec, layer))
        yield


@contextmanager
def layer_carried_out(block: Any, spec: ModelSpec, layer: LayerPlan) -> Iterator[None]:
    """Run one MoE block of the stock model under its part of a plan, see ``carried_out``."""
    with ExitStack() as stack:
        stack.enter_context(_experts(block.experts, layer))
        if layer.mapping in ("expert_map", "constants"):
            mapped = MappedExperts(block.experts, layer, block.gate.weight.device)
            stack.enter_context(_changed(block, experts=mapped))
            stack.enter_context(_changed(block.gate, top_k=layer.top_k))
        elif layer.router_map is None:
            side = [name.removeprefix("gate.") for name in spec.architecture.side_tensors]
            stack.enter_context(_sliced_gate(block.gate, layer, side))
        else:
            hook = _MappedRouter(layer, spec.router, block.gate.weight.device)
            # Runs after the gate: its logits are right, its choice is replaced.
            stack.enter_context(_hooked(block.gate, hook))
        yield


@contextmanager
def _experts(experts: Any, layer: LayerPlan) -> Iterator[None]:
    if layer.is_identity:
        yield
        return
    new = merged_experts(layer, experts.gate_up_proj, experts.down_proj)
    gate_up, down = (nn.Parameter(weight, requires_grad=False) for weight in new)
    with _changed(experts, gate_up_proj=gate_up, down_proj=down, num_experts=layer.kept_experts):
        yield


@contextmanager
def _sliced_gate(gate: Any, layer: LayerPlan, side_tensors: Sequence[str]) -> Iterator[None]:
    kept = list(layer.kept)
    changed = {name: getattr(gate, name)[kept] for name in side_tensors}
    weight = nn.Parameter(gate.weight[kept], requires_grad=False)
    with _changed(gate, weight=weight, num_experts=len(kept), top_k=layer.top_k, **changed):
        yield


@contextmanager
def _changed(module: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextmanager
def _hooked(module: Any, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _MappedRouter:
    """EEP's router: softmax over the old experts, map, top-k, divide by the sum (methods.md 2.2).

    Models that do not renormalise keep the mapped scores as they are.
    """

    def __init__(self, layer: LayerPlan, router: Router, device: torch.device) -> None:
        self._map = torch.tensor(layer.router_map, device=device)
        self._top_k = layer.top_k
        self._router = router

    def __call__(
        self, _: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        del inputs
        logits = output[0]
        scores = logits.float().softmax(-1) @ self._map.T
        weights, ids = scores.topk(self._top_k, -1)
        if self._router.renormalise:
            total = weights.sum(-1, keepdim=True)
            weights = weights / torch.where(total.abs() < SMALLEST_SUM, SMALLEST_SUM, total)
        return logits, weights * self._router.scale, ids
