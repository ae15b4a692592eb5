"""Synthetic Mixtral checkpoints of any size, and what a step of one must read and multiply.

Weights are random but scaled so that activations keep their size from layer to layer, and the
router is decided: its logits have a deviation of about 2. There is no tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from liveprune.pruning.plan import LayerPlan, Lineage, Plan

HEAD_DIM = 64
"""vLLM's CPU attention wants a multiple of 32."""


@dataclass(frozen=True)
class ModelShape:
    """A Mixtral model; ``pruned`` is the same after a uniform plan."""

    hidden: int
    intermediate: int
    layers: int
    experts: int = 8
    top_k: int = 2
    kv_heads: int = 2
    vocabulary: int = 1024
    dtype: str = "bfloat16"

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_DIM

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def item_bytes(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def expert_parameters(self) -> int:
        """Of one expert in one layer."""
        return 3 * self.hidden * self.intermediate

    @property
    def dense_parameters(self) -> int:
        """Matrices that every token meets: attention, gates and the output head."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * HEAD_DIM
        return self.layers * (attention + self.experts * self.hidden) + self.head_parameters

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        experts = self.layers * self.experts * self.expert_parameters
        return experts + self.dense_parameters + self.head_parameters

    def decode_bytes(self, distinct: float) -> float:
        """Weights that a step must read if each layer's tokens hit ``distinct`` experts."""
        experts = self.layers * distinct * self.expert_parameters
        return (experts + self.dense_parameters) * self.item_bytes

    def decode_operations(self, batch: int) -> float:
        """Multiply-adds of a step; attention over a short context is left out."""
        active = self.layers * self.top_k * self.expert_parameters
        return batch * (active + self.dense_parameters)

    def prefill_operations(self, tokens: int) -> float:
        """Multiply-adds of one prompt: all its tokens, one of them through the output head."""
        active = self.layers * self.top_k * self.expert_parameters
        dense = self.dense_parameters - self.head_parameters
        # Each token looks at half of the prompt on average: scores, then values.
        attention = self.layers * self.heads * HEAD_DIM * tokens * tokens
        return tokens * (active + dense) + attention + self.head_parameters

    def expected_experts(self, batch: int) -> float:
        """Distinct experts that ``batch`` tokens hit in a layer if all are equally likely."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** batch)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ModelShape:
        return cls(
            arguments.hidden, arguments.intermediate, arguments.layers, dtype=arguments.dtype
        )


def add_shape_arguments(
    parser: argparse.ArgumentParser, hidden: int, intermediate: int, layers: int
) -> None:
    parser.add_argument("--hidden", type=int, default=hidden, help="multiple of 128")
    parser.add_argument("--intermediate", type=int, default=intermediate, help="multiple of 32")
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")


def write_model(folder: Path, shape: ModelShape, seed: int = 0) -> None:
    """Save a checkpoint in the new folder ``folder``: one shard a layer, one for the rest."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    dtype = shape.torch_dtype

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))
        return values.to(dtype)

    weight_map: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    hidden, queries = shape.hidden, shape.heads * HEAD_DIM
    norm = torch.ones(hidden, dtype=dtype)
    save(
        {
            "model.embed_tokens.weight": matrix(shape.vocabulary, hidden, hidden**0.5),
            "lm_head.weight": matrix(shape.vocabulary, hidden),
            "model.norm.weight": norm,
        }
    )
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        values = shape.kv_heads * HEAD_DIM
        tensors = {
            f"{prefix}.input_layernorm.weight": norm.clone(),
            f"{prefix}.post_attention_layernorm.weight": norm.clone(),
            f"{prefix}.self_attn.q_proj.weight": matrix(queries, hidden),
            f"{prefix}.self_attn.k_proj.weight": matrix(values, hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(values, hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, queries, 0.5),
            f"{prefix}.block_sparse_moe.gate.weight": matrix(shape.experts, hidden, 2.0),
        }
        for expert in range(shape.experts):
            name = f"{prefix}.block_sparse_moe.experts.{expert}"
            tensors[f"{name}.w1.weight"] = matrix(shape.intermediate, hidden)
            tensors[f"{name}.w2.weight"] = matrix(hidden, shape.intermediate)
            tensors[f"{name}.w3.weight"] = matrix(shape.intermediate, hidden)
        save(tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(shape)))


def prune_plan(shape: ModelShape, kept: int, top_k: int, seed: int = 0) -> Plan:
    """Keep ``kept`` random experts of every layer."""
    generator = np.random.default_rng(seed)

    def layer(index: int) -> LayerPlan:
        ids = sorted(generator.choice(shape.experts, kept, replace=False).tolist())
        return LayerPlan(index, shape.experts, top_k, tuple(ids))

    return _plan(shape, [layer(index) for index in range(shape.layers)])


def merge_plan(shape: ModelShape, kept: int, top_k: int, seed: int = 0) -> Plan:
    """Mix all experts into ``kept`` under a router map, both random with rows that sum to 1."""
    generator = np.random.default_rng(seed)

    def layer(index: int) -> LayerPlan:
        merge, router_map = generator.dirichlet(np.ones(shape.experts), (2, kept))
        return LayerPlan(
            index,
            shape.experts,
            top_k,
            merge=merge.astype(np.float32),
            router_map=router_map.astype(np.float32),
        )

    return _plan(shape, [layer(index) for index in range(shape.layers)])


def expected_rows(plans: Sequence[Plan], each: int) -> float:
    """Expert rows that ``each`` tokens of every plan hit in a layer, mean over the layers.

    All experts of a plan are taken as equally likely, merged ones as rows of their own.
    """
    missed: dict[tuple[int, object], float] = {}
    for number, plan in enumerate(plans):
        for layer in plan.layers:
            count = layer.kept_experts
            merged = [(number, j) for j in range(count)]
            for row in merged if layer.merge is not None else layer.kept:
                key = (layer.layer, row)
                missed[key] = missed.get(key, 1.0) * (1 - layer.top_k / count) ** each
    return sum(1 - share for share in missed.values()) / len(plans[0].layers)


def _plan(shape: ModelShape, layers: Sequence[LayerPlan]) -> Plan:
    return Plan("mixtral", shape.layers, tuple(layers), Lineage("benchmark"))


def _config(shape: ModelShape) -> dict[str, object]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": HEAD_DIM,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": shape.dtype,
    }


def describe(shape: ModelShape) -> dict[str, object]:
    """For the JSON results."""
    return {**asdict(shape), "parameters": shape.parameters}
