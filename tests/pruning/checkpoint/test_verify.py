"""Damaged checkpoints are refused, by name, with what was found and what was expected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.checkpoint.verify import check_finite, verify_checkpoint
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.model_spec import ModelSpec
from tests.checkpoints import edited, fused, make_plan, merge_plan

TinyModel = Callable[..., Path]
Held = dict[str, torch.Tensor]
BLOCK = "model.layers.1.block_sparse_moe."


@pytest.fixture(scope="module")
def pruned(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counts 5, 6, 5 of 8."""
    base = tiny_model("mixtral")
    plan = make_plan(base, [(0, 1, 3, 5, 7), (0, 1, 2, 3, 6, 7), (2, 3, 4, 6, 7)])
    folder = tmp_path_factory.mktemp("pruned") / "out"
    apply_plan(base, plan, folder)
    return folder


@pytest.fixture(scope="module")
def mapped(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny_model("mixtral")
    folder = tmp_path_factory.mktemp("mapped") / "out"
    apply_plan(base, merge_plan(base, 4, router_map=True), folder)
    return folder


def swap(held: Held, a: str, b: str) -> Held:
    """Exchange the tensors under two prefixes."""
    renamed = {}
    for name, tensor in held.items():
        for old, new in ((a, b), (b, a)):
            if name.startswith(old):
                name = new + name.removeprefix(old)  # noqa: PLW2901
                break
        renamed[name] = tensor
    return renamed


def refuse(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        verify_checkpoint(folder)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3"])
def test_whole_checkpoints_pass(
    family: str, pruned: Path, mapped: Path, tiny_model: TinyModel
) -> None:
    verify_checkpoint(tiny_model(family))
    verify_checkpoint(pruned)
    verify_checkpoint(mapped)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({"liveprune": {"plan": "0" * 32}}, r"liveprune\.plan is 0{32}, expected [0-9a-f]{32}"),
        (
            {"num_experts_per_tok": 1},
            r"layer 0 has \(experts, top-k\) \(5, 1\), expected \(5, 2\)",
        ),
    ],
)
def test_a_config_that_contradicts_the_plan_beside_it(
    edit: dict[str, Any], match: str, pruned: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(pruned, folder)
    config = json.loads((folder / "config.json").read_text())
    config["liveprune"].update(edit.pop("liveprune", {}))
    (folder / "config.json").write_text(json.dumps({**config, **edit}))
    refuse(folder, match)


@pytest.mark.parametrize("name", [f"experts.5.{x}.weight" for x in ("w1", "w2", "w3")])
def test_missing_expert_tensor(name: str, pruned: Path, tmp_path: Path) -> None:
    folder = edited(
        pruned, tmp_path / "m", lambda held: {k: v for k, v in held.items() if k != BLOCK + name}
    )
    refuse(folder, rf"{BLOCK}{name}: not found in layer 1; expected experts 0 to 5")


def test_extra_expert(pruned: Path, tmp_path: Path) -> None:
    """The sixth expert of layer 1 again, in a layer of five."""
    extra = "model.layers.2.block_sparse_moe.experts.5"

    def add(held: Held) -> Held:
        more = {
            k.replace("layers.1", "layers.2"): v
            for k, v in held.items()
            if "1.block_sparse_moe.experts.5" in k
        }
        return {**held, **more}

    folder = edited(pruned, tmp_path / "m", add)
    refuse(folder, rf"{extra}: found in layer 2, expected experts 0 to 4 only")


def test_swapped_layers(pruned: Path, tmp_path: Path) -> None:
    def exchange(held: Held) -> Held:
        return swap(held, "model.layers.0.block_sparse_moe.", "model.layers.2.block_sparse_moe.")

    refuse(edited(pruned, tmp_path / "m", exchange), "layer 0 holds the weights of layer 2")


@pytest.mark.parametrize("layout", ["classic", "fused"])
def test_swapped_experts(layout: str, pruned: Path, tmp_path: Path) -> None:
    def exchange(held: Held) -> Held:
        held = swap(held, f"{BLOCK}experts.0.", f"{BLOCK}experts.1.")
        return fused(held, ModelSpec.from_path(pruned)) if layout == "fused" else held

    refuse(edited(pruned, tmp_path / "m", exchange), "layer 1: router or experts have fingerprint")


def test_changed_router(pruned: Path, tmp_path: Path) -> None:
    def change(held: Held) -> None:
        held[f"{BLOCK}gate.weight"][5, 63] += 1

    refuse(edited(pruned, tmp_path / "m", change), "layer 1: router or experts have fingerprint")


def test_fingerprints_of_other_layers(pruned: Path, tmp_path: Path) -> None:
    block = json.loads((pruned / "config.json").read_text())["liveprune"]
    del block["fingerprints"]["1"]
    folder = edited(pruned, tmp_path / "m", liveprune=block)
    refuse(folder, r"fingerprints names the layers \[0, 2\], expected \[0, 1, 2\]")
    del block["fingerprints"]
    verify_checkpoint(edited(pruned, tmp_path / "none", liveprune=block))


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("gate.weight", lambda x: x[:5], r"shape is \[5, 64\], expected \[6, 64\]"),
        ("gate.weight", None, "gate.weight: not found in layer 1; expected 6 rows"),
        ("experts.3.w1.weight", lambda x: x[:, :60], r"shape is \[48, 60\], expected \[48, 64\]"),
        ("experts.3.w2.weight", lambda x: x.half(), "found F16 .* expected F32 .* like expert 0"),
        ("experts.3.w2.bias", lambda _: torch.ones(4), "experts.0.w2.bias: not found"),
        ("router_map", lambda _: torch.ones(6, 8), "expected none, the config states no router_wi"),
    ],
)
def test_shapes(
    name: str,
    change: Callable[[Any], torch.Tensor] | None,
    match: str,
    pruned: Path,
    tmp_path: Path,
) -> None:
    def edit(held: Held) -> None:
        old = held.pop(BLOCK + name, None)
        if change is not None:
            held[BLOCK + name] = change(old).clone()

    refuse(edited(pruned, tmp_path / "m", edit), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda _: None, r"router_map: not found; layer 1 has 8 gate rows for 4 experts"),
        (lambda x: x[:3].clone(), r"router_map: found F32 \[3, 8\], expected F32 \[4, 8\]"),
        (lambda x: x.bfloat16(), r"router_map: found BF16 \[4, 8\], expected F32 \[4, 8\]"),
        (lambda x: x + 1, "layer 1: router or experts have fingerprint"),
    ],
)
def test_router_maps(
    change: Callable[[torch.Tensor], torch.Tensor | None],
    match: str,
    mapped: Path,
    tmp_path: Path,
) -> None:
    def edit(held: Held) -> None:
        new = change(held.pop(f"{BLOCK}router_map"))
        if new is not None:
            held[f"{BLOCK}router_map"] = new

    refuse(edited(mapped, tmp_path / "m", edit), match)


def test_side_tensors(tiny_model: TinyModel, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"

    def shorten(held: Held) -> None:
        held[name] = held[name][:7].clone()

    def drop(held: Held) -> None:
        del held[name]

    base = tiny_model("deepseek_v3")
    refuse(edited(base, tmp_path / "a", shorten), rf"{name}: shape is \[7\], expected \[8\]")
    refuse(edited(base, tmp_path / "b", drop), rf"{name}: not found in layer 1")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h: h.pop("model.layers.3.mlp.experts.7.up_proj.weight"), None),
        (
            lambda h: [h.pop(k) for k in list(h) if "3.mlp.experts.7" in k],
            "experts.7: missing; .*7 e",
        ),
        (
            lambda h: h.update({"model.layers.3.mlp.experts.8.up_proj.weight": torch.ones(1)}),
            "8: extra",
        ),
        (lambda h: [h.pop(k) for k in list(h) if "layers.3." in k], None),
    ],
    ids=["not looked into", "missing", "extra", "absent"],
)
def test_draft_layers(
    change: Callable[[Held], Any], match: str | None, tiny_model: TinyModel, tmp_path: Path
) -> None:
    def edit(held: Held) -> Held:
        copied = {k.replace(".2.mlp", ".3.mlp"): v for k, v in held.items() if ".2.mlp" in k}
        result = {**held, **copied}
        change(result)
        return result

    base = tiny_model("deepseek_v3")
    folder = edited(base, tmp_path / "m", edit, num_nextn_predict_layers=1)
    if match is None:
        verify_checkpoint(folder)
    else:
        refuse(folder, match)


def test_fused_experts(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("qwen3_moe")
    spec = ModelSpec.from_path(base)
    prefix = "model.layers.1.mlp.experts"

    def shorten(held: Held) -> Held:
        held = fused(held, spec)
        return {**held, f"{prefix}.down_proj": held[f"{prefix}.down_proj"][:7].clone()}

    def drop(held: Held) -> Held:
        held = fused(held, spec)
        del held[f"{prefix}.down_proj"]
        return held

    def both(held: Held) -> Held:
        kept = {k: v for k, v in held.items() if "layers.1.mlp.experts.3" in k}
        return {**fused(held, spec), **kept}

    def scales(held: Held) -> Held:
        return {**fused(held, spec), f"{prefix}.down_proj_scale": torch.ones(3, 1)}

    verify_checkpoint(edited(base, tmp_path / "whole", lambda held: fused(held, spec)))
    refuse(edited(base, tmp_path / "a", shorten), r"shape is \[7, 64, 32\], expected \[8, 64, 32\]")
    refuse(edited(base, tmp_path / "b", drop), rf"{prefix}.down_proj: not found, expected \[8, 64")
    refuse(edited(base, tmp_path / "c", both), rf"{prefix}.3: found beside fused expert tensors")
    refuse(edited(base, tmp_path / "d", scales), r"down_proj_scale: shape is \[3, 1\], expected 8")


FLOATS = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_nan_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liveprune.pruning.checkpoint.verify._CHUNK", 8)
    values = torch.ones(5, 7)
    check_finite("x", values.to(dtype))
    check_finite("x", values.to(dtype).t())
    values[3, 2] = float("nan")
    with pytest.raises(CheckpointError, match="x: found NaN or infinity in 1 of 8 elements"):
        check_finite("x", values.to(dtype))


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinity_is_found(dtype: torch.dtype, value: float) -> None:
    with pytest.raises(CheckpointError, match="w: found NaN or infinity in 1 of 4 elements"):
        check_finite("w", torch.tensor([1.0, value, 2.0, 0.0]).to(dtype))


def test_tensors_without_nan_pass() -> None:
    check_finite("empty", torch.zeros(0, 3))
    check_finite("packed", torch.full((4,), -1, dtype=torch.int32))
    check_finite("mask", torch.tensor([True]))
    check_finite("fp4", torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
