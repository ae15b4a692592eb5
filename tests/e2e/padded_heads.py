"""The same model with heads twice as wide, for vLLM's CPU attention, which takes 32 and up.

Exact by construction: the second half of each half of a head is zero, rotary frequencies of the
first half stay (theta squared at twice the width), and queries make up for the softmax scale.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def pad_heads(model: Path, target: Path) -> None:
    """Write ``model``, a Mixtral with heads of 16, to ``target`` with heads of 32."""
    config = json.loads((model / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    config.pop("rope_parameters", None)
    config |= {"head_dim": 2 * width, "rope_theta": theta**2}
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            tensors[name] = 2**0.5 * _widen(tensor, heads)
        elif name.endswith(("k_proj.weight", "v_proj.weight")):
            tensors[name] = _widen(tensor, groups)
        elif name.endswith("o_proj.weight"):
            tensors[name] = _widen(tensor.t(), heads).t().contiguous()
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def _widen(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads * width, n] to [heads * 2 width, n]: zeros after each half of a head's rows."""
    halves = rows.view(heads, 2, -1, rows.shape[1])
    return torch.cat([halves, torch.zeros_like(halves)], dim=2).reshape(-1, rows.shape[1])
