"""Tiny random models of every family, saved as the published checkpoints are.

Experts differ clearly in direction and scale and the router is decided, so that greedy tokens
and top-k sets do not hang on rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
"""Every ``model_type`` of ``ARCHITECTURES``."""

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = ("\n", *(chr(i) for i in range(32, 127)))
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
}
_QWEN: dict[str, Any] = {
    "num_experts": 8,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
    "decoder_sparse_step": 1,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 48},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 48, "norm_topk_prob": False},
    "qwen3_moe": {**_QWEN, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "intermediate_size": 32, "norm_topk_prob": False},
    # Greedy top-k; pass topk_method="group_limited_greedy", n_group=4, topk_group=2 for groups.
    "deepseek_v2": {**_LATENT_ATTENTION, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {
        **_LATENT_ATTENTION,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "num_nextn_predict_layers": 0,
    },
}


def tiny_model(
    family: str, folder: Path, *, seed: int = 0, dtype: str = "float32", **overrides: Any
) -> Path:
    """Save a random model and a character tokenizer in ``folder``; returns ``folder``.

    Hidden size 64, 3 layers, 8 experts (top-2), vocabulary 128; ``overrides`` are config fields.
    The tensors carry the classic per-expert names.
    """
    torch_dtype = getattr(torch, dtype)
    fields = {**_COMMON, **_FAMILY[family], **overrides}
    config = AutoConfig.for_model(family, **fields, dtype=torch_dtype)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, seed)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=2, pad_token_id=0)
    model.to(torch_dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter: norms near 1, routers decided, experts unlike each other."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator) * std

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            leaf = name.rpartition(".")[0].rpartition(".")[2]
            if "norm" in leaf:
                parameter.copy_(1 + normal(parameter, 0.1))
            elif ".experts." in name and parameter.ndim == 3:
                scale = torch.linspace(0.6, 1.4, len(parameter))
                order = torch.randperm(len(parameter), generator=generator)
                parameter.copy_(normal(parameter, 0.2) * scale[order, None, None])
            elif leaf == "gate":
                parameter.copy_(normal(parameter, 0.3))
            elif leaf in ("embed_tokens", "lm_head"):
                parameter.copy_(normal(parameter, 0.7))
            else:
                parameter.copy_(normal(parameter, 0.12))
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(normal(buffer, 0.1))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character (printable ASCII and newline), 100 ids, with a chat template."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )
