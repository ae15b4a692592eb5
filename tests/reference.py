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
    kept = list(layer.kept)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name).data
        if layer.merge is None:
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
