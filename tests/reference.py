"""The independent reference: stock transformers, experts physically removed or merged in memory.

Shares no code with ``apply`` or the vLLM plugin: it edits the modules of the loaded base model.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from liveprune.pruning.plan import LayerPlan, Plan


def load(model: Path) -> Any:
    """The stock model in float32."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def pruned_model(base: Path, plan: Plan) -> Any:
    """The base model with ``plan`` carried out on its modules."""
    model = load(base)
    for layer in plan.layers:
        decoder = model.model.layers[layer.layer]
        _prune_block(getattr(decoder, "mlp", None) or decoder.block_sparse_moe, layer)
    return model


def _prune_block(block: Any, layer: LayerPlan) -> None:
    gate, experts = block.gate, block.experts
    if layer.constants is not None or layer.expert_map:
        _map_block(gate, experts, layer)
        return
    kept = list(layer.kept)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name).data
        if layer.neuron_map is not None:
            weight = _gathered(weight, layer, name)
        elif layer.merge is None:
            weight = weight[kept]
        else:
            mixed = torch.einsum("ji,iab->jab", torch.tensor(layer.merge).double(), weight.double())
            weight = mixed.float()
        setattr(experts, name, torch.nn.Parameter(weight))
    experts.num_experts = layer.kept_experts
    gate.top_k = layer.top_k
    if layer.router_map is not None:
        gate.router_map = torch.tensor(layer.router_map)
        gate.forward = types.MethodType(_eep_forward, gate)
        return
    gate.weight = torch.nn.Parameter(gate.weight.data[kept])
    gate.num_experts = len(kept)
    bias = getattr(gate, "e_score_correction_bias", None)
    if bias is not None:
        gate.e_score_correction_bias = bias[kept]


def _gathered(weight: torch.Tensor, layer: LayerPlan, name: str) -> torch.Tensor:
    """Neuron by neuron, in float64. gate_up [E, 2 ffn, hidden]: rows n and ffn + n are neuron n."""
    assert layer.neuron_map is not None
    assert layer.neuron_shares is not None
    ffn = layer.neuron_map.shape[1]
    new = torch.zeros(layer.kept_experts, *weight.shape[1:], dtype=torch.float64)
    total = torch.zeros(layer.kept_experts * ffn, dtype=torch.float64)
    for expert, targets in enumerate(layer.neuron_map.tolist()):
        share = float(layer.neuron_shares[expert])
        for neuron, target in enumerate(targets):
            if target < 0:
                continue
            total[target] += share
            j, m = divmod(target, ffn)
            old = weight[expert].double()
            if name == "down_proj":
                new[j, :, m] += share * old[:, neuron]
            else:
                new[j, m] += share * old[neuron]
                new[j, ffn + m] += share * old[ffn + neuron]
    total = total.view(-1, ffn)
    scale = total[:, None, :] if name == "down_proj" else torch.cat([total, total], 1)[:, :, None]
    return (new / scale).float()


def _map_block(gate: Any, experts: Any, layer: LayerPlan) -> None:
    """The gate stays; each old expert computes as a new one, or answers with its constant."""
    gate.top_k = layer.top_k
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name).data
        if layer.neuron_map is not None:
            new = _gathered(weight, layer, name)
        elif layer.merge is not None:
            new = torch.einsum("ji,iab->jab", torch.tensor(layer.merge).double(), weight.double())
        else:
            new = weight
        if layer.expert_map:
            # A copy for each old expert: what "has its work done by" means.
            setattr(experts, name, torch.nn.Parameter(new.float()[list(layer.expert_map)]))
    if layer.constants is None:
        return
    vectors = dict(zip(layer.pruned, torch.tensor(layer.constants), strict=True))
    original = experts.forward

    def forward(hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        output = torch.zeros_like(hidden_states)
        for slot in range(ids.shape[1]):
            for expert in range(layer.experts):
                chosen = (ids[:, slot] == expert).nonzero()[:, 0]
                if expert in vectors:
                    output[chosen] += weights[chosen, slot, None] * vectors[expert]
                elif len(chosen):
                    one = ids[chosen, slot, None], weights[chosen, slot, None]
                    output[chosen] += original(hidden_states[chosen], *one)
        return output

    experts.forward = forward


def _eep_forward(self: Any, hidden_states: torch.Tensor) -> Any:
    """EEP, literally: softmax over the old experts, map, top-k, divide by the sum."""
    hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = hidden_states @ self.weight.T
    mapped = torch.softmax(logits.float(), -1) @ self.router_map.T
    weights, ids = mapped.topk(self.top_k, -1)
    if getattr(self, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights, ids


@torch.no_grad()
def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """Greedy continuation, end of sequence ignored."""
    sequence = list(prompt)
    for _ in range(tokens):
        logits = model(torch.tensor([sequence])).logits[0, -1]
        sequence.append(int(logits.argmax()))
    return sequence[len(prompt) :]


@torch.no_grad()
def prompt_logprobs(model: Any, prompt: list[int]) -> list[float]:
    """log p(token i | tokens before i) for i >= 1."""
    logprobs = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), -1)
    return [float(logprobs[i - 1, prompt[i]]) for i in range(1, len(prompt))]
