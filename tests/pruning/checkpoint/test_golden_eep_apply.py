"""Coefficients of the official EEP code, carried out on files, give its weights and its logits.

See golden/eep/README.md for what was run and for the tolerances.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.checkpoint.verify import verify_checkpoint
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from tests import reference
from tests.checkpoints import assert_same, tensors

LAYERS, EXPERTS, TOP_K, BUDGET = 3, 8, 2, 4
KINDS = {"onehot": 5e-5, "onehot_unsorted": 5e-5, "continuous_nonneg": 5e-5, "continuous": 1e-3}
"""Tolerance of the logits."""


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden"


def coefficients(golden: Path, kind: str) -> list[tuple[Any, Any]]:
    """(expert merging, router mapping) of each layer; the last layer is called "others"."""
    held = load_file(golden / f"eep/mixtral_rand.b{BUDGET}.{kind}.coeff.safetensors")
    names = [(f"layers.{i}", f"transfer.{i}") for i in range(LAYERS - 1)]
    names.append(("others", "others_transfer"))
    return [(held[a].numpy(), held[b].numpy()) for a, b in names]


def plan_of(layers: list[LayerPlan]) -> Plan:
    return Plan("mixtral", LAYERS, tuple(layers), Lineage("eep"))


def merged(golden: Path, kind: str, tmp_path: Path) -> Path:
    layers = [
        LayerPlan(i, EXPERTS, TOP_K, merge=merge, router_map=router_map)
        for i, (merge, router_map) in enumerate(coefficients(golden, kind))
    ]
    apply_plan(golden / "ckpt/mixtral_rand", plan_of(layers), tmp_path / "merged")
    verify_checkpoint(tmp_path / "merged")
    return tmp_path / "merged"


@pytest.mark.parametrize("kind", KINDS)
def test_merged_experts(golden: Path, kind: str, tmp_path: Path) -> None:
    expected = load_file(golden / f"eep/mixtral_rand.b{BUDGET}.{kind}.moe_state.safetensors")
    after = tensors(merged(golden, kind, tmp_path))
    actual = {name: after[name] for name in expected}
    experts = {name for name in after if ".experts." in name}
    assert experts == {name for name in expected if ".experts." in name}
    if kind.startswith("onehot"):
        assert_same(actual, expected)
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@torch.no_grad()
def forward(checkpoint: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The base model's modules with experts and router map as stored in ``checkpoint``."""
    held = tensors(checkpoint)
    spec = ModelSpec.from_path(checkpoint)
    model = reference.load(checkpoint.parent / "base")
    for layer in spec.layers:
        prefix = f"model.layers.{layer.index}.block_sparse_moe."
        block = model.model.layers[layer.index].mlp
        block.forward = _Block(held, prefix, layer.experts)
    output: torch.Tensor = model(
        inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).logits
    return output


class _Block:
    """softmax over all old experts -> router map -> top-k -> divide by the sum, token by token."""

    def __init__(self, held: dict[str, torch.Tensor], prefix: str, experts: int) -> None:
        self.gate = held[f"{prefix}gate.weight"]
        self.router_map = held[f"{prefix}router_map"]
        self.experts = [
            [held[f"{prefix}experts.{j}.{name}.weight"] for name in ("w1", "w3", "w2")]
            for j in range(experts)
        ]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        scores = torch.softmax(tokens @ self.gate.T, -1) @ self.router_map.T
        weights, ids = scores.topk(TOP_K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        output = torch.zeros_like(tokens)
        for j, (gate, up, down) in enumerate(self.experts):
            token, slot = torch.where(ids == j)
            x = tokens[token]
            y = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
            output.index_add_(0, token, y * weights[token, slot, None])
        return output.view_as(hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_logits(golden: Path, kind: str, tmp_path: Path) -> None:
    checkpoint = merged(golden, kind, tmp_path)
    (tmp_path / "base").symlink_to(golden / "ckpt/mixtral_rand")
    inputs = load_file(golden / "calib_rand.safetensors")
    actual = forward(checkpoint, inputs)
    expected = load_file(golden / f"eep/mixtral_rand.b{BUDGET}.{kind}.logits.safetensors")
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected["logits"][real], rtol=0, atol=KINDS[kind])


@pytest.mark.parametrize("kind", ["onehot", "onehot_unsorted"])
def test_one_hot_coefficients_are_a_plain_checkpoint(
    golden: Path, kind: str, tmp_path: Path
) -> None:
    """Rows are sorted (order means nothing), and stock transformers gives the golden logits."""
    layers = []
    for i, (merge, router_map) in enumerate(coefficients(golden, kind)):
        assert np.array_equal(merge, router_map)
        kept = tuple(sorted(int(x) for x in merge.argmax(1)))
        layers.append(LayerPlan(i, EXPERTS, TOP_K, kept))
    base = golden / "ckpt/mixtral_rand"
    apply_plan(base, plan_of(layers), tmp_path / "sliced")
    by_merge = [
        LayerPlan(x.layer, EXPERTS, TOP_K, x.kept, merge=np.eye(EXPERTS)[list(x.kept)])
        for x in layers
    ]
    apply_plan(base, plan_of(by_merge), tmp_path / "merged")
    assert_same(tensors(tmp_path / "sliced"), tensors(tmp_path / "merged"))

    inputs = load_file(golden / "calib_rand.safetensors")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        model = reference.load(tmp_path / "sliced")
        actual = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected = load_file(golden / f"eep/mixtral_rand.b{BUDGET}.{kind}.logits.safetensors")["logits"]
    torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=5e-5)
