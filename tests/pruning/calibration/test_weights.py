from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from liveprune.pruning.calibration.weights import Weights, read_tensor
from liveprune.pruning.checkpoint.safetensors_io import read_header
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.model_spec import ModelSpec

MakeModel = Callable[..., Path]


def weights_of(model: Path) -> Weights:
    return Weights(model, ModelSpec.from_path(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_and_slices_are_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.randn(3, 4, 5).to(dtype)
    save_file({"first": torch.zeros(7, dtype=dtype), "x": value}, tmp_path / "a.safetensors")
    entry = next(e for e in read_header(tmp_path / "a.safetensors") if e.name == "x")
    assert torch.equal(read_tensor(entry), value)
    assert torch.equal(read_tensor(entry, 2), value[2])


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, dtype=torch.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(
        CheckpointError, match="x: dtype is I8, expected one of F64, F32, F16, BF16"
    ):
        read_tensor(read_header(tmp_path / "a.safetensors")[0])


def test_experts_and_gate(tiny_model: MakeModel) -> None:
    model = tiny_model("mixtral")
    stored = load_file(model / "model.safetensors")
    layer = weights_of(model).layers[1]
    at = "model.layers.1.block_sparse_moe."
    assert torch.equal(layer.gate(), stored[f"{at}gate.weight"])
    for i, (gate_up, down) in enumerate(layer.experts()):
        w1, w2, w3 = (stored[f"{at}experts.{i}.w{n}.weight"] for n in (1, 2, 3))
        assert torch.equal(gate_up, torch.cat([w1, w3]))
        assert torch.equal(down, w2)


def test_packed_experts_are_refused_without_a_word_in_the_config(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("mixtral"), model)
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if ".experts." in name:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="found quantised experts"):
        weights_of(model)


def test_a_missing_tensor_is_named(tiny_model: MakeModel) -> None:
    with pytest.raises(CheckpointError, match=r"tensor model\.nothing is missing"):
        weights_of(tiny_model("mixtral")).tensor("model.nothing")
