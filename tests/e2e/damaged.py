"""Pruned checkpoints that must be refused, and what the refusal must say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]

_LAYER = "model.layers.{}.block_sparse_moe."
_FIRST, _SECOND = _LAYER.format(0), _LAYER.format(1)


@dataclass(frozen=True)
class Damaged:
    """One kind of damage to a mixtral checkpoint; in the plan ``counts``, 5, 7 and 1 experts."""

    damage: Callable[[Tensors, Config], None]
    message: str
    """Regular expression of the refusal."""
    plan: str = "counts"
    read: bool = False
    """Only noticed while weights are read; all else is refused before any tensor is read."""

    def write(self, source: Path, target: Path) -> Path:
        """Copy the checkpoint ``source``, which has one weight file, with the damage."""
        shutil.copytree(source, target)
        weights, config = target / "model.safetensors", target / "config.json"
        tensors, form = load_file(weights), json.loads(config.read_text())
        self.damage(tensors, form)
        save_file(tensors, weights, {"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, weights.name)}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
        config.write_text(json.dumps(form))
        return target


def _missing_tensor(tensors: Tensors, config: Config) -> None:
    del tensors[f"{_FIRST}experts.2.w2.weight"]


def _missing_expert(tensors: Tensors, config: Config) -> None:
    for name in ("w1", "w2", "w3"):
        del tensors[f"{_SECOND}experts.6.{name}.weight"]


def _extra_expert(tensors: Tensors, config: Config) -> None:
    for name in ("w1", "w2", "w3"):
        tensors[f"{_FIRST}experts.5.{name}.weight"] = tensors[
            f"{_FIRST}experts.4.{name}.weight"
        ].clone()


def _not_a_number(tensors: Tensors, config: Config) -> None:
    """In the last element: behind what the fingerprints cover."""
    tensors[f"{_SECOND}experts.3.w1.weight"][-1, -1] = torch.nan


def _wrong_shape(tensors: Tensors, config: Config) -> None:
    name = f"{_FIRST}experts.1.w1.weight"
    tensors[name] = tensors[name].T.contiguous()


def _whole_gate(tensors: Tensors, config: Config) -> None:
    """The gate of the base model: eight rows for five experts."""
    name = f"{_FIRST}gate.weight"
    tensors[name] = torch.cat((tensors[name], tensors[name][:3]))


def _swapped_layers(tensors: Tensors, config: Config) -> None:
    for name in [name for name in tensors if name.startswith(_FIRST)]:
        other = name.replace(_FIRST, _SECOND)
        tensors[name], tensors[other] = tensors[other], tensors[name]


def _swapped_experts(tensors: Tensors, config: Config) -> None:
    for name in [name for name in tensors if name.startswith(f"{_FIRST}experts.0.")]:
        other = name.replace("experts.0.", "experts.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def _no_router_map(tensors: Tensors, config: Config) -> None:
    del tensors[f"{_SECOND}router_map"]


def _unknown_version(tensors: Tensors, config: Config) -> None:
    config["liveprune"]["version"] = 2


def _foreign_attribute(tensors: Tensors, config: Config) -> None:
    config["per_layer_config"]["2"]["intermediate_size"] = 16


def _contradicting_keys(tensors: Tensors, config: Config) -> None:
    config["per_layer_config"]["0"] |= {"num_local_experts": 5, "num_experts": 6}


DAMAGED = {
    "missing tensor": Damaged(
        _missing_tensor,
        r"layers\.0\.\S+experts\.2\.w2\.weight: not found in layer 0; expected experts 0 to 4",
    ),
    "missing expert": Damaged(
        _missing_expert,
        r"layers\.1\.\S+experts\.6\.w1\.weight: not found in layer 1; expected experts 0 to 6",
    ),
    "extra expert": Damaged(
        _extra_expert,
        r"layers\.0\.\S+experts\.5: found in layer 0, expected experts 0 to 4 only",
    ),
    "NaN": Damaged(
        _not_a_number,
        r"layers\.1\.\S+experts\.3\.w1\.weight: found NaN or infinity in 1 of 3072 elements",
        read=True,
    ),
    "wrong shape": Damaged(
        _wrong_shape,
        r"layers\.0\.\S+experts\.1\.w1\.weight: shape is \[64, 48\], expected \[48, 64\]",
    ),
    "whole gate": Damaged(
        _whole_gate,
        r"layers\.0\.\S+gate\.weight: shape is \[8, 64\], expected \[5, 64\]",
    ),
    "swapped layers": Damaged(
        _swapped_layers, r"layer 0 holds the weights of layer 1", plan="uniform"
    ),
    "swapped experts": Damaged(_swapped_experts, r"layer 0: router or experts have fingerprint"),
    "no router map": Damaged(
        _no_router_map,
        r"layers\.1\.\S+router_map: not found; .* expected F32 \[8, 8\]",
        plan="router_map",
    ),
    "unknown version": Damaged(_unknown_version, r"liveprune\.version is 2; this release reads 1"),
    "foreign attribute": Damaged(
        _foreign_attribute,
        r"per_layer_config of layer 2 holds \['intermediate_size'\]; expected only",
    ),
    "contradicting keys": Damaged(
        _contradicting_keys,
        r"found \{'num_local_experts': 5, 'num_experts': 6\}, expected one expert count",
    ),
}
