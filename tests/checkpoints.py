"""Helpers for tests of checkpoints: plans in short form, other layouts of the tiny models."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan

TOKENS = torch.arange(4, 68).view(2, 32)


def make_plan(model: Path, kept: Sequence[Sequence[int]], top_k: int | None = None) -> Plan:
    """Prune: ``kept`` per MoE layer, or one list for all."""
    spec = ModelSpec.from_path(model)
    lists = list(kept) * len(spec.layers) if len(kept) == 1 else list(kept)
    return _plan(
        spec,
        [
            LayerPlan(layer.index, layer.experts, top_k or layer.top_k, tuple(ids))
            for layer, ids in zip(spec.layers, lists, strict=True)
        ],
    )


def merge_plan(
    model: Path, count: int, *, kept: Sequence[int] | None = None, router_map: bool = False
) -> Plan:
    """Merge with random coefficients, under a router map or with gate rows ``kept``."""
    spec = ModelSpec.from_path(model)
    generator = np.random.default_rng(7)
    layers = []
    for layer in spec.layers:
        merge, mapped = generator.normal(size=(2, count, layer.experts)).astype(np.float32)
        layers.append(
            LayerPlan(
                layer.index,
                layer.experts,
                min(layer.top_k, count),
                kept=tuple(kept or ()),
                merge=merge,
                router_map=np.abs(mapped) if router_map else None,
            )
        )
    return _plan(spec, layers)


def identity_plan(model: Path) -> Plan:
    return make_plan(model, [range(x.experts) for x in ModelSpec.from_path(model).layers])


def _plan(spec: ModelSpec, layers: Sequence[LayerPlan]) -> Plan:
    return Plan(
        architecture=spec.architecture.model_type,
        num_hidden_layers=spec.num_hidden_layers,
        layers=tuple(layers),
        lineage=Lineage("test", {"a": 1}, seed=3),
        base_model="org/base",
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, through the safetensors library, as the index names them."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    found: dict[str, torch.Tensor] = {}
    for file in sorted(set(weight_map.values())):
        found |= load_file(folder / file)
    assert found.keys() == weight_map.keys()
    return found


def assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    """Equal names, dtypes, shapes and bytes."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.dtype, tensor.shape) == (b[name].dtype, b[name].shape), name
        # 0-d and NaN safe: compare the bytes.
        left, right = (x.reshape(-1).contiguous().view(torch.uint8) for x in (tensor, b[name]))
        assert torch.equal(left, right), name


def edited(
    model: Path,
    target: Path,
    edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None] | None = None,
    shards: int = 1,
    **config: Any,
) -> Path:
    """A copy of ``model`` with edited tensors, cut into ``shards``, and config fields set."""
    shutil.copytree(model, target)
    held = tensors(model)
    if edit is not None:
        held = edit(held) or held
    for file in target.glob("model*.safetensors*"):
        file.unlink()
    save_sharded(held, target, shards)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


def save_sharded(held: Mapping[str, torch.Tensor], target: Path, shards: int) -> None:
    held = {name: tensor.clone().contiguous() for name, tensor in held.items()}
    if shards == 1:
        save_file(held, target / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    names = sorted(held)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: held[name] for name in part}, target / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    form = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(form))


def fused(held: dict[str, torch.Tensor], spec: ModelSpec) -> dict[str, torch.Tensor]:
    """transformers' in-memory layout: [E, 2f, d] and [E, d, f] per layer."""
    names = spec.architecture.experts
    result = dict(held)
    for layer in spec.layers:
        prefix = spec.architecture.block_prefix(layer.index)
        matrices: dict[str, list[torch.Tensor]] = {
            name: [result.pop(f"{prefix}experts.{i}.{name}.weight") for i in range(layer.experts)]
            for name in names
        }
        pairs = zip(matrices[names.gate], matrices[names.up], strict=True)
        result[f"{prefix}experts.gate_up_proj"] = torch.stack([torch.cat(x) for x in pairs])
        result[f"{prefix}experts.down_proj"] = torch.stack(matrices[names.down])
    return result


def load_per_layer(model: Path) -> Any:
    """Load a checkpoint whose layers differ: stock classes, each given its own layer's config.

    transformers 5.19 parses ``per_layer_config`` and hands out one config a layer, but the classes
    of these families still ask the global one, and refuse.
    """
    config = AutoConfig.from_pretrained(model)
    config.allow_global_per_layer_attribute_access = True
    with _layers_ask_their_own_config(config.model_type):
        return AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=torch.float32
        ).eval()


@contextmanager
def _layers_ask_their_own_config(model_type: str) -> Iterator[None]:
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    decoder = next(getattr(module, x) for x in dir(module) if x.endswith("DecoderLayer"))
    original = decoder.__init__

    def init(self: Any, config: Any, layer_idx: int) -> None:
        original(self, config.per_layer_config[layer_idx], layer_idx)

    decoder.__init__ = init
    try:
        yield
    finally:
        decoder.__init__ = original


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(TOKENS).logits
    return result
