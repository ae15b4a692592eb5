"""Merges neuron by neuron, mapped experts and constants: what stands in the files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.checkpoint import neuron_merge
from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.checkpoint.merge import Span
from liveprune.pruning.checkpoint.neuron_merge import NeuronMerge
from liveprune.pruning.checkpoint.verify import verify_checkpoint
from liveprune.pruning.errors import CheckpointError, PlanError
from liveprune.pruning.evaluation.carried_out import carried_out
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.neuron_sources import only_source
from liveprune.pruning.plan import LayerPlan
from liveprune.pruning.plan_io import load_plan
from tests import checkpoints, reference
from tests.checkpoints import edited, fused, identity_plan, make_plan, tensors
from tests.forms import FORMS, form_plan, random_neurons
from tests.token_loop import new_experts

TinyModel = Callable[..., Path]
Held = dict[str, torch.Tensor]
KEPT = (0, 3, 4, 6)
BLOCK = "model.layers.1.mlp."
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def expert(held: Held, prefix: str, i: int) -> tuple[torch.Tensor, ...]:
    return tuple(held.pop(f"{prefix}experts.{i}.{name}.weight") for name in PROJECTIONS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_tensors_equal_a_loop_over_neurons(
    form: str, dtype: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model("deepseek_v3", n_group=2, topk_group=1, dtype=dtype)
    plan = form_plan(base, form, kept=KEPT)
    apply_plan(base, plan, tmp_path / "out")
    verify_checkpoint(tmp_path / "out")
    assert load_plan(tmp_path / "out") == plan
    before, after = tensors(base), tensors(tmp_path / "out")
    for layer in plan.layers:
        prefix = f"model.layers.{layer.layer}.mlp."
        old = [expert(before, prefix, i) for i in range(8)]
        exact = new_experts([tuple(x.double() for x in e) for e in old], layer)  # type: ignore[misc]
        for j, matrices in enumerate(exact):
            for found, wanted in zip(expert(after, prefix, j), matrices, strict=True):
                assert found.dtype == old[0][0].dtype
                step = torch.finfo(found.dtype).eps
                torch.testing.assert_close(found.double(), wanted, rtol=step, atol=1e-6)
        for name in ("gate.weight", "gate.e_score_correction_bias"):
            gate, whole = after.pop(prefix + name), before.pop(prefix + name)
            assert torch.equal(gate, whole[[*KEPT]] if form == "neurons+kept" else whole)
        if form != "neurons+kept":
            ids = after.pop(f"{prefix}expert_map")
            assert ids.dtype == torch.int32
            constant = [0, -1, -1, 1, 2, -1, 3, -1]
            assert ids.tolist() == (constant if form == "constants" else [*layer.expert_map])
        if form == "constants":
            vectors = after.pop(f"{prefix}constants")
            assert vectors.dtype == torch.float32
            assert np.array_equal(vectors.numpy(), layer.constants)  # type: ignore[arg-type]
    checkpoints.assert_same(after, before)


@pytest.mark.parametrize("form", FORMS)
def test_fused_experts_stay_fused(form: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("mixtral", dtype="bfloat16")
    spec = ModelSpec.from_path(base)
    plan = form_plan(base, form)
    source = edited(base, tmp_path / "base", lambda held: fused(held, spec), shards=2)
    apply_plan(source, plan, tmp_path / "out")
    apply_plan(base, plan, tmp_path / "classic")
    verify_checkpoint(tmp_path / "out")
    expected = fused(tensors(tmp_path / "classic"), ModelSpec.from_path(tmp_path / "classic"))
    checkpoints.assert_same(tensors(tmp_path / "out"), expected)
    blocks = [
        json.loads((tmp_path / name / "config.json").read_text())["liveprune"]
        for name in ("out", "classic")
    ]
    assert blocks[0]["fingerprints"] == blocks[1]["fingerprints"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["neurons+kept", "neurons+map"])
def test_weights_are_bit_for_bit_those_of_the_plan_carried_out_in_memory(
    form: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model("olmoe", dtype=str(dtype).removeprefix("torch."))
    plan = form_plan(base, form)
    apply_plan(base, plan, tmp_path / "out")
    held = fused(tensors(tmp_path / "out"), ModelSpec.from_path(tmp_path / "out"))
    model = reference.load(base).to(dtype)
    with carried_out(model, ModelSpec.from_path(base), plan):
        experts = model.model.layers[1].mlp.experts
        experts = getattr(experts, "_experts", experts)
        assert torch.equal(held[f"{BLOCK}experts.gate_up_proj"], experts.gate_up_proj.data)
        assert torch.equal(held[f"{BLOCK}experts.down_proj"], experts.down_proj.data)


def test_an_expert_that_goes_on_alone_is_copied(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Byte for byte, NaN included: it is not computed."""

    def poison(held: Held) -> None:
        held[f"{BLOCK}experts.5.down_proj.weight"][3, 4] = float("nan")

    base = edited(tiny_model("qwen2_moe"), tmp_path / "base", poison)
    size = ModelSpec.from_path(base).expert_size
    neuron_map = np.full((8, size), -1)
    neuron_map[5] = np.arange(size)
    neuron_map[2] = size + np.arange(size)[::-1]
    plan = identity_plan(base)
    merged = LayerPlan(1, 8, 2, (2, 5), neuron_map=neuron_map, neuron_shares=np.ones(8))
    layers = [merged if x.layer == 1 else x for x in plan.layers]
    plan = checkpoints._plan(ModelSpec.from_path(base), layers)
    apply_plan(base, plan, tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    for name in PROJECTIONS:
        copied, moved = (after[f"{BLOCK}experts.{j}.{name}.weight"] for j in range(2))
        checkpoints.assert_same({"": copied}, {"": before[f"{BLOCK}experts.5.{name}.weight"]})
        axis = 1 if name == "down_proj" else 0
        assert torch.equal(moved, before[f"{BLOCK}experts.2.{name}.weight"].flip(axis))
    assert torch.equal(after[f"{BLOCK}gate.weight"], before[f"{BLOCK}gate.weight"][[2, 5]])


@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from(["F32", "BF16", "F16"]),
    st.integers(1, 40),
    st.integers(0, 2**32),
    st.data(),
)
def test_any_neuron_map_in_chunks_of_any_size(
    experts: int, ffn: int, hidden: int, dtype: str, chunk: int, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, experts))
    by_column = data.draw(st.booleans())
    rng = np.random.default_rng(seed)
    neuron_map = random_neurons(rng, experts, count, ffn)
    shares = rng.uniform(0.5, 2, experts)
    kept = tuple(range(count))
    layer = LayerPlan(0, experts, 1, kept, neuron_map=neuron_map, neuron_shares=shares)
    kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    old = torch.from_numpy(rng.normal(size=(experts, ffn, hidden))).to(kind)
    stored = old.transpose(1, 2) if by_column else old
    data_bytes = stored.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    size = len(data_bytes) // experts
    shape = stored.shape[1:]
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuron_merge, "CHUNK_ELEMENTS", chunk)
        path = Path(folder) / "weights"
        path.write_bytes(data_bytes)
        file = os.open(path, os.O_RDONLY)
        spans = tuple(Span(f"e{i}", path, i * size, size) for i in range(experts))
        for j in range(count):
            merge = NeuronMerge(layer, j, spans, shape[0], by_column, dtype)
            found = bytearray(size)
            for start, (part,) in merge.chunks({path: file}):
                found[start : start + len(part)] = part
            made = torch.frombuffer(found, dtype=kind).view(shape)
            neurons = (made.t() if by_column else made).double().numpy()
            for m in range(ffn):
                places = [(i, n) for i, n in np.argwhere(neuron_map == j * ffn + m)]
                total = sum(shares[i] for i, _ in places)
                wanted = sum(shares[i] / total * old[i, n].double().numpy() for i, n in places)
                eps = torch.finfo(kind).eps
                np.testing.assert_allclose(neurons[m], wanted, rtol=eps, atol=1e-5 * eps + 1e-6)
            if only_source(layer, j) is not None:
                assert torch.equal(made, stored[only_source(layer, j)])
        os.close(file)


@pytest.mark.parametrize("form", ["constants", "neurons+map"])
def test_more_choices_than_experts(form: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Top-2 over eight gate rows, one expert behind them; what survives another apply."""
    base = tiny_model("qwen3_moe")
    apply_plan(base, form_plan(base, form, kept=(3,)), tmp_path / "out")
    verify_checkpoint(tmp_path / "out")
    spec = ModelSpec.from_path(tmp_path / "out")
    mapping = "constants" if form == "constants" else "expert_map"
    assert {(x.experts, x.top_k, x.router_width, x.mapping) for x in spec.layers} == {
        (1, 2, 8, mapping)
    }
    assert not spec.is_uniform
    block = spec.config["liveprune"]
    assert block["router_mapping"] == dict.fromkeys(block["router_width"], mapping)


@pytest.mark.parametrize("form", ["constants", "merge+map"])
def test_a_mapping_survives_an_identity_plan_and_no_other(
    form: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model("mixtral")
    apply_plan(base, form_plan(base, form), tmp_path / "mapped")
    apply_plan(tmp_path / "mapped", identity_plan(tmp_path / "mapped"), tmp_path / "again")
    verify_checkpoint(tmp_path / "again")
    checkpoints.assert_same(tensors(tmp_path / "again"), tensors(tmp_path / "mapped"))
    found = [ModelSpec.from_path(tmp_path / x).layers for x in ("mapped", "again")]
    assert found[0] == found[1]
    words = {"constants": "constant experts", "merge+map": "an expert map"}[form]
    with pytest.raises(PlanError, match=rf"layer 0: this checkpoint already has {words} \(8 gate"):
        apply_plan(tmp_path / "mapped", make_plan(tmp_path / "mapped", [(0, 1)]), tmp_path / "no")


def test_quantised_experts_take_constants_and_no_merges(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model("qwen3_moe")

    def quantise(held: Held) -> Held:
        scales = {
            f"{k}_scale_inv": torch.full((1, 1), len(k) + 0.5) for k in held if ".experts" in k
        }
        narrow = {k: v.to(torch.float8_e4m3fn) if ".experts" in k else v for k, v in held.items()}
        return {**narrow, **scales}

    source = edited(base, tmp_path / "base", quantise, quantization_config={"quant_method": "fp8"})
    apply_plan(source, form_plan(base, "constants"), tmp_path / "out")
    verify_checkpoint(tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    for new, old in enumerate(KEPT):
        names = ("up_proj.weight", "up_proj.weight_scale_inv")
        checkpoints.assert_same(
            {x: after[f"{BLOCK}experts.{new}.{x}"] for x in names},
            {x: before[f"{BLOCK}experts.{old}.{x}"] for x in names},
        )
    assert torch.equal(after[f"{BLOCK}gate.weight"], before[f"{BLOCK}gate.weight"])
    for form in ("merge+map", "neurons+kept", "neurons+map"):
        with pytest.raises(PlanError, match=r"layer 0: .* merges experts, but .* is quantised"):
            apply_plan(source, form_plan(base, form), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_sources_that_are_not_finite_are_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("mixtral")
    for name, at in (("w1", (7, 3)), ("w2", (3, 7))):
        key = f"model.layers.1.block_sparse_moe.experts.5.{name}.weight"

        def poison(held: Held, key: str = key, at: tuple[int, int] = at) -> None:
            held[key][at] = float("inf")

        model = edited(base, tmp_path / name, poison)
        neuron_map = np.arange(8)[:, None] % 4 * 48 + np.arange(48)
        layers = [
            LayerPlan(i, 8, 2, KEPT, neuron_map=neuron_map, neuron_shares=np.ones(8))
            for i in range(3)
        ]
        plan = checkpoints._plan(ModelSpec.from_path(base), layers)
        with pytest.raises(CheckpointError, match=f"{key}: found NaN or infinity, expected finite"):
            apply_plan(model, plan, tmp_path / "out")
        assert not (tmp_path / "out").exists()
