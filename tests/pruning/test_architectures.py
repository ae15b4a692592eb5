from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoConfig

from liveprune.pruning import architectures
from liveprune.pruning.architectures import ARCHITECTURES, ExpertNames, architecture_of
from liveprune.pruning.errors import ArchitectureError
from liveprune.pruning.model_spec import ModelSpec

FAMILIES = sorted(ARCHITECTURES)


def test_the_families() -> None:
    assert FAMILIES == [
        "deepseek_v2",
        "deepseek_v3",
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
    ]
    with pytest.raises(TypeError):
        ARCHITECTURES["new"] = ARCHITECTURES["olmoe"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ARCHITECTURES["olmoe"].block = "ffn"  # type: ignore[misc]


def test_expert_names_come_in_the_order_of_the_formula() -> None:
    assert tuple(ExpertNames("g", "u", "d")) == ("g", "u", "d")
    assert tuple(ARCHITECTURES["mixtral"].experts) == ("w1", "w3", "w2")


@pytest.mark.parametrize("config", [{}, {"model_type": "llama"}, {"model_type": None}])
def test_unknown_families_are_refused_with_the_known_ones(config: dict[str, object]) -> None:
    with pytest.raises(ArchitectureError, match=r"model_type is .*; Liveprune knows .*qwen3_moe"):
        architecture_of(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_those_of_transformers(family: str) -> None:
    architecture = ARCHITECTURES[family]
    config = AutoConfig.for_model(family)
    assert architecture.count_key in config.to_dict()
    # The alias that transformers itself resolves is one of ours.
    renamed = {a for a, c in type(config).attribute_map.items() if c == architecture.count_key}
    assert renamed <= set(architecture.count_aliases)
    for alias in architecture.count_aliases:
        assert alias in renamed
    keys = [architecture.top_k_key, architecture.expert_size_key, architecture.mtp_key]
    for key in (*filter(None, keys), *architecture.required):
        assert hasattr(config, key), key


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_names_are_those_of_saved_checkpoints(
    family: str, tiny_model: Callable[..., Path]
) -> None:
    """Every expert and gate tensor of a saved model is named by the table, and nothing else."""
    folder = tiny_model(family)
    config = json.loads((folder / "config.json").read_text())
    architecture = architecture_of(config)
    assert config["architectures"] == list(architecture.classes)
    spec = ModelSpec.from_path(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected: dict[str, tuple[int, ...]] = {}
    for layer in spec.layers:
        prefix = architecture.block_prefix(layer.index)
        expected[prefix + architecture.gate] = (layer.router_width, spec.hidden_size)
        expected |= {prefix + side: (layer.experts,) for side in architecture.side_tensors}
        for expert in range(layer.experts):
            name = f"{prefix}experts.{expert}."
            wide = (spec.expert_size, spec.hidden_size)
            expected[f"{name}{architecture.experts.gate}.weight"] = wide
            expected[f"{name}{architecture.experts.up}.weight"] = wide
            expected[f"{name}{architecture.experts.down}.weight"] = wide[::-1]
    found = {n: s for n, s in shapes.items() if ".experts." in n or ".gate." in n}
    assert found == expected
    shared = {n for n in shapes if architecture.shared and f".{architecture.shared}." in n}
    assert bool(shared) == (architecture.shared is not None)


def test_the_example_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "adding-an-architecture.md").read_text()
    entry, usage = (part.partition("```")[0] for part in text.split("```python\n")[1:])
    added = eval(entry, vars(architectures))  # noqa: S307 - our own documentation
    monkeypatch.setattr(architectures, "ARCHITECTURES", {added.model_type: added})
    names: dict[str, Any] = {"ModelSpec": ModelSpec}
    setup, expression = usage.strip().removesuffix("# [(1, 8, 2), (2, 8, 2)]").split("}\n")
    exec(setup + "}", names)  # noqa: S102 - our own documentation
    assert eval(expression, names) == [(1, 8, 2), (2, 8, 2)]  # noqa: S307
