"""Plans carried out on files equal plans carried out on the loaded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.checkpoint.verify import verify_checkpoint
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_io import load_plan
from tests import checkpoints, reference
from tests.checkpoints import identity_plan, make_plan, merge_plan, tensors

TinyModel = Callable[..., Path]

FOUR = [(0, 3, 4, 6)]
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "deepseek_v2": {},
    # Two groups of four: a group must keep two experts at least.
    "deepseek_v3": {"n_group": 2, "topk_group": 1},
}


def compare(base: Path, plan: Plan, output: Path, load: Callable[[Path], Any]) -> None:
    apply_plan(base, plan, output)
    verify_checkpoint(output)
    actual = checkpoints.logits(load(output))
    expected = checkpoints.logits(reference.pruned_model(base, plan))
    assert torch.equal(actual, expected)
    full = checkpoints.logits(reference.load(base))
    assert not torch.allclose(expected, full, atol=1e-2)  # The plan does something.


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_plans_load_in_stock_transformers(
    family: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model(family, **FAMILIES[family])
    compare(base, make_plan(base, FOUR), tmp_path / "out", reference.load)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_lower_top_k(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model(family)
    compare(base, make_plan(base, FOUR, top_k=1), tmp_path / "out", reference.load)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_experts_per_tok"] == 1
    assert "per_layer_config" not in config


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_counts_that_differ_by_layer(
    family: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    groups = {"n_group": 1, "topk_group": 1} if family == "deepseek_v3" else {}
    base = tiny_model(family, **groups)
    lists = [(0, 1, 2, 4, 7), (1, 2, 3, 4, 5, 6, 7), tuple(range(8))]
    plan = make_plan(base, lists[: len(ModelSpec.from_path(base).layers)])
    compare(base, plan, tmp_path / "out", checkpoints.load_per_layer)


def test_groups_of_different_sizes_by_layer(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("deepseek_v3", n_group=2, topk_group=1, first_k_dense_replace=0)
    lists = [(0, 3, 4, 6), (0, 1, 2, 5, 6, 7), tuple(range(8))]
    compare(base, make_plan(base, lists), tmp_path / "out", checkpoints.load_per_layer)


def test_a_plan_that_keeps_all_copies_the_weights(tiny_model: TinyModel, tmp_path: Path) -> None:
    base, out = tiny_model("deepseek_v3"), tmp_path / "out"
    apply_plan(base, identity_plan(base), out)
    name = "model.safetensors"
    assert (out / name).read_bytes() == (base / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config.pop("liveprune")["plan"] == identity_plan(base).digest
    assert config == json.loads((base / "config.json").read_text())


def test_pruning_moves_bytes_only(tiny_model: TinyModel, tmp_path: Path) -> None:
    """New expert j is kept id j; gate rows and the correction bias follow; the rest stays."""
    base, out = tiny_model("deepseek_v3", n_group=2, topk_group=1), tmp_path / "out"
    apply_plan(base, make_plan(base, FOUR), out)
    before = tensors(base)
    expected = {k: v for k, v in before.items() if ".mlp.experts." not in k}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp."
        for new, old in enumerate(FOUR[0]):
            for name in ("gate_proj", "up_proj", "down_proj"):
                key = f"{prefix}experts.{old}.{name}.weight"
                expected[f"{prefix}experts.{new}.{name}.weight"] = before[key]
        for name in ("gate.weight", "gate.e_score_correction_bias"):
            expected[prefix + name] = before[prefix + name][list(FOUR[0])]
    checkpoints.assert_same(tensors(out), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kept", [None, (1, 2, 5, 7)])
def test_merges_sum_in_float32(
    dtype: str, kept: tuple[int, ...] | None, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base, out = tiny_model("mixtral", dtype=dtype), tmp_path / "out"
    plan = merge_plan(base, 4, kept=kept, router_map=kept is None)
    apply_plan(base, plan, out)
    verify_checkpoint(out)
    before, after = tensors(base), tensors(out)
    for layer in plan.layers:
        prefix = f"model.layers.{layer.layer}.block_sparse_moe."
        assert layer.merge is not None
        for name in ("w1", "w2", "w3"):
            keys = [f"{prefix}experts.{i}.{name}.weight" for i in range(8)]
            stacked = torch.stack([before.pop(key) for key in keys])
            for new in range(4):
                row = torch.tensor(layer.merge[new]).double()
                exact = torch.einsum("i,iab->ab", row, stacked.double())
                merged = after.pop(keys[new])
                assert merged.dtype == stacked.dtype
                step = torch.finfo(merged.dtype).eps
                torch.testing.assert_close(merged.double(), exact, rtol=step, atol=1e-6)
        gate = before.pop(f"{prefix}gate.weight")
        assert torch.equal(
            after.pop(f"{prefix}gate.weight"), gate if kept is None else gate[[*kept]]
        )
        if kept is None:
            assert layer.router_map is not None
            router_map = after.pop(f"{prefix}router_map")
            assert np.array_equal(router_map.numpy(), layer.router_map)
    checkpoints.assert_same(after, before)


def test_merged_layers_of_unequal_counts_equal_merging_in_memory(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model("qwen3_moe")
    plan = merge_plan(base, 5, kept=(0, 2, 3, 6, 7))
    apply_plan(base, plan, tmp_path / "out")
    actual = checkpoints.logits(reference.load(tmp_path / "out"))
    expected = checkpoints.logits(reference.pruned_model(base, plan))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)


def test_what_is_written_beside_the_weights(tiny_model: TinyModel, tmp_path: Path) -> None:
    base, out = tiny_model("qwen2_moe"), tmp_path / "new" / "out"
    plan = merge_plan(base, 4, router_map=True)
    seen: list[tuple[int, int]] = []
    apply_plan(base, plan, out, progress=lambda done, total: seen.append((done, total)))
    assert load_plan(out) == plan
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "liveprune/plan.json",
        "liveprune/plan.safetensors",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    total = sum(x.numel() * x.element_size() for x in tensors(out).values())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_pruned_checkpoint_can_be_pruned_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("olmoe")
    apply_plan(base, make_plan(base, [(0, 1, 2, 4, 6, 7)]), tmp_path / "six")
    apply_plan(tmp_path / "six", make_plan(tmp_path / "six", [(0, 2, 5)]), tmp_path / "three")
    apply_plan(base, make_plan(base, [(0, 2, 7)]), tmp_path / "direct")
    checkpoints.assert_same(tensors(tmp_path / "three"), tensors(tmp_path / "direct"))


def test_a_router_map_survives_an_identity_plan(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("mixtral")
    apply_plan(base, merge_plan(base, 4, router_map=True), tmp_path / "mapped")
    apply_plan(tmp_path / "mapped", identity_plan(tmp_path / "mapped"), tmp_path / "again")
    verify_checkpoint(tmp_path / "again")
    checkpoints.assert_same(tensors(tmp_path / "again"), tensors(tmp_path / "mapped"))
