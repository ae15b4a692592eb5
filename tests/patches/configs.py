"""Small config.json contents of every family."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
}
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16},
    "olmoe": {"num_experts": 8},
    "deepseek_v2": {**_LATENT, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_LATENT, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
}


def raw_config(family: str, **changes: Any) -> dict[str, Any]:
    """A config.json of four layers, 8 experts and top-2; DeepSeek's first layer is dense."""
    return {"model_type": family, **_COMMON, **FAMILIES[family], **changes}
