"""Base models that vLLM's CPU build can run, and the plans that the engine tests carry out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from tests import reference

# vLLM's CPU attention takes head sizes that are multiples of 32.
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
# The published DeepSeek sizes: vLLM knows MLA with these only. And the published kind of rotary
# embedding, YaRN: with the plain kind vLLM's CPU kernel takes a head's rotary part to lie next to
# the following head's, so that already the unpruned model differs from transformers.
_LATENT: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
}
_GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", _HEADS),
    "qwen2_moe": ("qwen2_moe", _HEADS),
    "qwen3_moe": ("qwen3_moe", {**_HEADS, "head_dim": 32}),
    # As many experts as Qwen3-30B-A3B, for counts that no tile size of a kernel divides.
    "qwen3_moe_wide": (
        "qwen3_moe",
        {**_HEADS, "head_dim": 32, "num_experts": 128, "num_experts_per_tok": 8},
    ),
    "olmoe": ("olmoe", _HEADS),
    "deepseek_v2": ("deepseek_v2", {**_LATENT, "routed_scaling_factor": 2.5}),
    "deepseek_v2_groups": (
        "deepseek_v2",
        {**_LATENT, **_GROUPS, "topk_method": "group_limited_greedy"},
    ),
    # As published; without the method vLLM has no correction bias.
    "deepseek_v3": (
        "deepseek_v3",
        {**_LATENT, **_GROUPS, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
}
"""Name of a base model -> family and config fields. All have three layers with experts."""

TOKENS = 8
"""Greedy tokens after each prompt."""

_COUNTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "uniform": ((4, 4, 4), (2, 2, 2)),
    "counts": ((5, 7, 1), (2, 2, 1)),
    "top_k": ((8, 8, 8), (2, 1, 2)),
    "identity": ((5, 7, 1), (2, 2, 1)),
    "merged": ((5, 7, 1), (2, 1, 1)),
    # The middle one is square: all experts stay, scores are mapped all the same.
    "router_map": ((4, 8, 2), (2, 1, 2)),
    # All gate rows stay, so top-k may be more than the experts.
    "tied": ((4, 7, 1), (2, 1, 2)),
    "constant": ((4, 7, 1), (2, 1, 2)),
    "gathered": ((5, 7, 1), (2, 2, 1)),
    "gathered_tied": ((3, 2, 5), (2, 2, 1)),
}
"""Plan -> experts and top-k of the three layers."""
_OWN_COUNTS: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "qwen3_moe_wide": {
        "uniform": ((103, 103, 103), (8, 8, 8)),
        "counts": ((96, 103, 5), (8, 8, 5)),
    },
    "deepseek_v2_groups": {
        "uniform": ((8, 8, 8), (3, 3, 3)),
        "counts": ((8, 12, 4), (3, 3, 2)),
        "top_k": ((16, 16, 16), (3, 1, 2)),
        "tied": ((7, 2, 9), (3, 3, 2)),
        "constant": ((7, 2, 9), (3, 3, 2)),
        "gathered": ((8, 8, 12), (3, 2, 3)),
    },
    "deepseek_v3": {
        "uniform": ((8, 8, 8), (3, 3, 3)),
        "counts": ((8, 12, 16), (3, 2, 3)),
        "top_k": ((16, 16, 16), (3, 1, 2)),
        "tied": ((7, 2, 9), (3, 3, 2)),
        "constant": ((7, 2, 9), (3, 3, 2)),
        "gathered": ((8, 8, 12), (3, 2, 3)),
    },
}


def engine_options(model: str) -> dict[str, Any]:
    """Further arguments of ``vllm.LLM`` for a base model, all in float32.

    On a CPU with AMX vLLM takes a kernel for latent attention that has no float32.
    """
    return {"attention_backend": "CPU_MLA"} if model.startswith("deepseek") else {}


def plans_of(model: str) -> tuple[str, ...]:
    """Names of the plans for a base model."""
    return tuple(_OWN_COUNTS.get(model, _COUNTS))


def make_plan(name: str, model: str, base: Path) -> Plan:
    """The plan ``name`` for the base model in ``base``; the same at every call."""
    spec = ModelSpec.from_path(base)
    counts, top_ks = _OWN_COUNTS.get(model, _COUNTS)[name]
    random = np.random.default_rng(7)
    layers = []
    for base_layer, count, top_k in zip(spec.layers, counts, top_ks, strict=True):
        fields: dict[str, Any] = {}
        total = base_layer.experts
        whole_gate = name in ("tied", "constant", "gathered_tied")
        kept = _kept(random, total, count, 1 if whole_gate else spec.router.groups)
        one_hot = np.eye(total)[list(kept)]
        if name == "identity":
            fields = {"merge": one_hot, "router_map": one_hot}
        elif name == "merged":
            fields = {"kept": kept, "merge": one_hot + random.normal(0, 0.1, one_hot.shape)}
        elif name == "tied":
            merge = random.normal(0, 0.5, one_hot.shape) + one_hot
            fields = {"merge": merge, "expert_map": _tied(random, total, count)}
        elif name == "constant":
            vectors = random.normal(0, 0.3, (total - count, spec.hidden_size))
            fields = {"kept": kept, "constants": vectors}
        elif name.startswith("gathered"):
            fields = {"kept": kept}
            if name == "gathered_tied":
                fields = {"expert_map": _tied(random, total, count)}
            fields |= _neurons(random, total, kept, spec.expert_size)
        elif name == "router_map":
            fields = {
                "merge": one_hot + random.normal(0, 0.1, one_hot.shape),
                # The published maps reach down to -0.26 (methods.md 2.2).
                "router_map": random.uniform(-0.26, 1, one_hot.shape),
            }
        else:
            fields = {"kept": kept}
        layers.append(LayerPlan(base_layer.index, total, top_k, **fields))
    return Plan(
        spec.architecture.model_type, spec.num_hidden_layers, tuple(layers), Lineage("test")
    )


def _kept(random: np.random.Generator, total: int, count: int, groups: int) -> tuple[int, ...]:
    """``count`` of ``total`` ids, ascending; the same number of each group."""
    size, share = total // groups, count // groups
    chosen = [
        int(i) + group * size
        for group in range(groups)
        for i in random.choice(size, share, replace=False)
    ]
    return tuple(sorted(chosen))


def _tied(random: np.random.Generator, total: int, count: int) -> tuple[int, ...]:
    """A new expert for each old one, each new one at least once."""
    some = [*range(count), *random.integers(0, count, total - count).tolist()]
    return tuple(random.permutation(some).tolist())


def _neurons(
    random: np.random.Generator, total: int, kept: tuple[int, ...], ffn: int
) -> dict[str, Any]:
    """Kept experts' neurons in another order, and two thirds of the others' on top of them."""
    places = random.integers(0, len(kept) * ffn, (total, ffn))
    neuron_map = np.where(random.random((total, ffn)) < 1 / 3, -1, places)
    for j, expert in enumerate(kept):
        neuron_map[expert] = j * ffn + random.permutation(ffn)
    return {"neuron_map": neuron_map, "neuron_shares": random.uniform(0.5, 2, total)}


def prompts() -> list[list[int]]:
    """Four prompts; the last two fill one and two KV blocks of 32 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 100, (n,), generator=generator).tolist() for n in (5, 17, 40, 70)]


def reference_model(base: Path, plan: Plan | None) -> Any:
    """Transformers' own model, with ``plan`` carried out on its modules."""
    if plan is None:
        return reference.load(base)
    model = reference.pruned_model(base, plan)
    if plan.architecture == "deepseek_v2":
        for layer in plan.layers:
            gate = model.model.layers[layer.layer].mlp.gate
            gate.norm_topk_prob = False  # it has no such attribute, and never divides by the sum
            if layer.router_map is not None:
                gate.forward = _scaled(gate.forward, gate.routed_scaling_factor)
    return model


def _scaled(route: Callable[..., Any], factor: float) -> Callable[..., Any]:
    def forward(hidden_states: torch.Tensor) -> Any:
        logits, weights, ids = route(hidden_states)
        return logits, weights * factor, ids

    return forward


def answers(model: Any) -> dict[str, Any]:
    """The reference's greedy tokens and log-probabilities of every prompt."""
    return {
        "tokens": [reference.greedy(model, prompt, TOKENS) for prompt in prompts()],
        "logprobs": [reference.prompt_logprobs(model, prompt) for prompt in prompts()],
    }
