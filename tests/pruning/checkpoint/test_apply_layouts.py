"""Shards, fused experts, quantised experts, draft layers: other ways a checkpoint can be stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.checkpoint.verify import verify_checkpoint
from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import ModelSpec
from tests import checkpoints
from tests.checkpoints import edited, fused, identity_plan, make_plan, merge_plan, tensors

TinyModel = Callable[..., Path]
FOUR = [(0, 3, 4, 6)]


def test_shards_are_kept_and_empty_ones_disappear(tiny_model: TinyModel, tmp_path: Path) -> None:
    """One shard for each expert of layer 0: dropped experts leave no file behind."""
    base = tiny_model("mixtral")
    held = tensors(base)
    sharded = edited(base, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    prefix = "model.layers.0.block_sparse_moe.experts."
    groups = [[k for k in held if k.startswith(f"{prefix}{i}.")] for i in range(8)]
    groups.append([k for k in held if not k.startswith(prefix)])
    weight_map = {}
    for number, names in enumerate(groups):
        file = f"part-{number}.safetensors"
        save_file({k: held[k] for k in names}, sharded / file)
        weight_map |= dict.fromkeys(names, file)
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))

    plan = make_plan(base, [(1, 5)])
    apply_plan(sharded, plan, tmp_path / "out")
    apply_plan(base, plan, tmp_path / "direct")
    verify_checkpoint(tmp_path / "out")
    files = sorted(x.name for x in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    after = tensors(tmp_path / "out")
    checkpoints.assert_same(after, tensors(tmp_path / "direct"))
    form = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    total = sum(x.numel() * x.element_size() for x in after.values())
    assert form["metadata"]["total_size"] == total


@pytest.mark.parametrize("shards", [1, 7])
def test_merges_reach_across_shards(shards: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("mixtral", dtype="bfloat16")
    plan = merge_plan(base, 3, router_map=True)
    apply_plan(edited(base, tmp_path / "base", shards=shards), plan, tmp_path / "out")
    apply_plan(base, plan, tmp_path / "direct")
    verify_checkpoint(tmp_path / "out")
    checkpoints.assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "direct"))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
@pytest.mark.parametrize("kind", ["pruned", "merged", "mapped"])
def test_fused_experts_stay_fused(
    family: str, kind: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """The same plan on both layouts gives the same weights and the same fingerprints."""
    base = tiny_model(family, dtype="bfloat16")
    spec = ModelSpec.from_path(base)
    plan = {
        "pruned": make_plan(base, FOUR),
        "merged": merge_plan(base, 4, kept=FOUR[0]),
        "mapped": merge_plan(base, 4, router_map=True),
    }[kind]
    source = edited(base, tmp_path / "base", lambda held: fused(held, spec))
    apply_plan(source, plan, tmp_path / "out")
    apply_plan(base, plan, tmp_path / "classic")
    verify_checkpoint(tmp_path / "out")
    pruned_spec = ModelSpec.from_path(tmp_path / "classic")
    expected = fused(tensors(tmp_path / "classic"), pruned_spec)
    checkpoints.assert_same(tensors(tmp_path / "out"), expected)
    configs = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "classic")
    ]
    assert configs[0]["liveprune"]["fingerprints"] == configs[1]["liveprune"]["fingerprints"]


def fp8(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Block-wise fp8 as DeepSeek-V3 publishes it; every scale is different."""
    result = dict(held)
    for number, name in enumerate(sorted(held)):
        if ".experts." in name:
            result[name] = held[name].to(torch.float8_e4m3fn)
            result[f"{name}_scale_inv"] = torch.full((1, 1), 1.0 + number)
            result[name.replace("weight", "input_scale")] = torch.tensor(2.0 + number)
    return result


def packed(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """compressed-tensors' int4 groups: packed weights, scales, zero points, order, shape."""
    result = dict(held)
    for number, name in enumerate(sorted(held)):
        if ".experts." in name:
            weight = result.pop(name)
            rows, columns = weight.shape
            numbers = torch.arange(rows * columns // 8, dtype=torch.int32) + number
            result[f"{name}_packed"] = numbers.view(rows, columns // 8)
            result[f"{name}_scale"] = weight[:, :4].bfloat16()
            result[f"{name}_zero_point"] = numbers[:rows].view(-1, 1)
            result[f"{name}_g_idx"] = torch.arange(columns, dtype=torch.int32)
            result[f"{name}_shape"] = torch.tensor([rows, columns])
    return result


@pytest.mark.parametrize(
    ("quantise", "method"), [(fp8, "fp8"), (packed, "compressed-tensors")], ids=["fp8", "packed"]
)
def test_quantised_experts_are_sliced_byte_for_byte(
    quantise: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    method: str,
    tiny_model: TinyModel,
    tmp_path: Path,
) -> None:
    base = tiny_model("qwen3_moe")
    source = edited(base, tmp_path / "base", quantise, quantization_config={"quant_method": method})
    verify_checkpoint(source)
    apply_plan(source, make_plan(base, [(1, 2, 4, 5, 7)]), tmp_path / "out")
    verify_checkpoint(tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    assert len(after) < len(before)
    for name, tensor in after.items():
        parts = name.split(".")
        if ".experts." in name:
            parts[5] = str((1, 2, 4, 5, 7)[int(parts[5])])
        old = before[".".join(parts)]
        old = old[[1, 2, 4, 5, 7]] if name.endswith("gate.weight") else old
        checkpoints.assert_same({"": tensor}, {"": old})

    with pytest.raises(PlanError, match=r"layer 0: .* merges experts, but .* is quantised"):
        apply_plan(source, merge_plan(base, 4, kept=FOUR[0]), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_single_experts_may_be_left_unquantised(tiny_model: TinyModel, tmp_path: Path) -> None:
    """An ignore list that names experts follows them, and so do their unlike tensors."""
    base = tiny_model("mixtral")
    prefix = "model.layers.1.block_sparse_moe.experts."

    def quantise(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = packed(held)
        for name in [x for x in held if x.startswith((f"{prefix}2.", f"{prefix}6."))]:
            result = {k: v for k, v in result.items() if not k.startswith(name)}
            result[name] = held[name]
        return result

    ignore = [f"{prefix}{i}.{name}" for i in (2, 6) for name in ("w1", "w2", "w3")]
    quantisation = {"quant_method": "compressed-tensors", "ignore": [*ignore, "lm_head"]}
    source = edited(base, tmp_path / "base", quantise, quantization_config=quantisation)
    apply_plan(source, make_plan(base, [(1, 3, 6)]), tmp_path / "out")
    verify_checkpoint(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    names = [f"{prefix}2.{name}" for name in ("w1", "w2", "w3")]
    assert config["quantization_config"]["ignore"] == [*names, "lm_head"]
    after = tensors(tmp_path / "out")
    assert torch.equal(after[f"{prefix}2.w1.weight"], tensors(source)[f"{prefix}6.w1.weight"])


def with_draft_layer(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DeepSeek-V3 keeps its multi-token-prediction layer after the decoder layers."""
    last = {k: v for k, v in held.items() if k.startswith("model.layers.2.")}
    copied = {k.replace("layers.2.", "layers.3."): v for k, v in last.items()}
    return {**held, **copied, "model.layers.3.eh_proj.weight": torch.ones(64, 128)}


def test_draft_layers_keep_all_experts(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("deepseek_v3", n_group=2, topk_group=1)
    source = edited(base, tmp_path / "base", with_draft_layer, num_nextn_predict_layers=1)
    apply_plan(source, make_plan(source, FOUR), tmp_path / "out")
    verify_checkpoint(tmp_path / "out")
    before, after = (
        {k: v for k, v in tensors(folder).items() if k.startswith("model.layers.3.")}
        for folder in (source, tmp_path / "out")
    )
    checkpoints.assert_same(before, after)
    block = json.loads((tmp_path / "out/config.json").read_text())["liveprune"]
    assert block["mtp_experts"] == 8
    # The count survives a second plan, although the scalar is 4 by now.
    apply_plan(tmp_path / "out", identity_plan(tmp_path / "out"), tmp_path / "again")
    verify_checkpoint(tmp_path / "again")


def test_dense_layers_and_shared_experts_are_copied(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("qwen2_moe", mlp_only_layers=[1])
    apply_plan(base, make_plan(base, FOUR), tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    routed = ".mlp.experts.", ".mlp.gate."
    rest = {k: v for k, v in before.items() if not any(x in k for x in routed)}
    assert any("shared_expert" in k for k in rest)
    assert any("layers.1.mlp.gate_proj" in k for k in rest)
    checkpoints.assert_same({k: after[k] for k in rest}, rest)
