from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from liveprune.pruning.calibration.observer import observe
from liveprune.pruning.calibration.rows import Rows
from liveprune.pruning.calibration.statistics import (
    EXTRAS,
    FIELDS,
    LayerStatistics,
    RoutingStatistics,
)
from liveprune.pruning.calibration.streamed import StreamedModel
from liveprune.pruning.errors import ArchitectureError, CheckpointError
from liveprune.pruning.model_spec import ModelSpec

MakeModel = Callable[..., Path]
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("mixtral", {"sliding_window": 4}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"mlp_only_layers": [1]}),
    ("qwen3_moe", {}),
    ("olmoe", {"num_experts_per_tok": 3}),
    ("deepseek_v2", {}),
    ("deepseek_v2", GROUPED),
    ("deepseek_v3", {}),
]
every_family = pytest.mark.parametrize(("family", "overrides"), CASES)


def some_rows(*lengths: int, seed: int = 0) -> Rows:
    generator = np.random.default_rng(seed)
    return Rows(tuple(generator.integers(0, 128, n) for n in lengths))


class Reference:
    """A stock model run row by row; records what each MoE block saw, in plain Python."""

    def __init__(self, model: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, experts_implementation="eager")
        self.routed: dict[int, list[tuple[torch.Tensor, ...]]] = {}
        self.residual: dict[int, torch.Tensor] = {}
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.outputs: dict[int, list[torch.Tensor]] = {}
        for index, layer in enumerate(self.model.model.layers):
            layer.register_forward_hook(
                lambda _m, _a, out, i=index: self.outputs.setdefault(i, []).append(out[0])
            )
            if hasattr(layer.mlp, "experts"):
                layer.post_attention_layernorm.register_forward_pre_hook(
                    lambda _m, args, i=index: self.residual.update({i: args[0][0]})
                )
                layer.mlp.gate.register_forward_hook(
                    lambda _m, _a, out, i=index: self.logits.setdefault(i, []).append(out[0])
                )
                layer.mlp.experts.register_forward_pre_hook(
                    lambda _m, args, i=index: self.routed.setdefault(i, []).append(
                        (*args, self.residual[i])
                    )
                )

    @torch.no_grad()
    def run(self, rows: Rows) -> None:
        for row in rows.token_ids:
            self.model(torch.from_numpy(row)[None])

    @torch.no_grad()
    def statistics(self, index: int) -> LayerStatistics:
        """Token by token, expert by expert, float64."""
        experts = self.model.model.layers[index].mlp.experts
        gate_up, down = experts.gate_up_proj.double(), experts.down_proj.double()
        sums = np.zeros((len(down), 3, 3))
        largest = np.full(len(down), -np.inf)
        contribution = np.zeros(len(down))
        shape = (len(down), down.shape[1])
        outs, squares, gated, dense = (np.zeros(shape) for _ in range(4))
        products, together = (np.zeros((len(down), len(down))) for _ in range(2))
        for (x, ids, weights, residual), logits in zip(
            self.routed[index], self.logits[index], strict=True
        ):
            for t in range(len(x)):
                for j in range(len(down)):
                    gate, up = (gate_up[j] @ x[t].double()).chunk(2)
                    dense[j] += (down[j] @ (torch.nn.functional.silu(gate) * up)).numpy()
                z = logits[t].double().numpy()
                products += np.outer(z, z)
                for i in ids[t].tolist():
                    for j in ids[t].tolist():
                        together[i, j] += 1
                chosen = list(zip(ids[t].tolist(), weights[t].tolist(), strict=True))
                outputs = {}
                for j, _ in chosen:
                    gate, up = (gate_up[j] @ x[t].double()).chunk(2)
                    outputs[j] = down[j] @ (torch.nn.functional.silu(gate) * up)
                routed = sum(g * outputs[j] for j, g in chosen)
                before = residual[t].double()
                cosine = torch.cosine_similarity(before, before + routed, dim=0).item()
                for j, g in chosen:
                    norm = outputs[j].norm().item()
                    for a in range(3):
                        for b in range(3):
                            sums[j, a, b] += g**a * norm**b
                    outs[j] += outputs[j].numpy()
                    squares[j] += outputs[j].numpy() ** 2
                    gated[j] += g * outputs[j].numpy()
                    largest[j] = max(largest[j], outputs[j].max().item())
                    contribution[j] += g * norm * max(0.0, 1 - cosine)
        return LayerStatistics(
            sums, largest, contribution, outs, squares, gated, products, together, dense
        )


def assert_close(one: LayerStatistics, other: LayerStatistics, rtol: float = 1e-4) -> None:
    assert np.array_equal(one.counts, other.counts)
    np.testing.assert_allclose(one.sums, other.sums, rtol=rtol)
    np.testing.assert_allclose(one.max_activation, other.max_activation, rtol=rtol, atol=1e-6)
    # 1 - cos loses digits in float32 where a block changes its stream little.
    np.testing.assert_allclose(one.contribution, other.contribution, rtol=10 * rtol, atol=1e-5)
    for name, array in one.arrays().items():
        if name not in FIELDS:
            scale = np.abs(other.gathered(name)).max()
            np.testing.assert_allclose(array, other.gathered(name), rtol=rtol, atol=rtol * scale)


EXTRAS_ASKED = ("outputs", "logits", "dense")


@every_family
def test_equals_a_loop_over_tokens(
    tiny_model: MakeModel, family: str, overrides: dict[str, Any]
) -> None:
    model = tiny_model(family, **overrides)
    rows = some_rows(9, 5, 12)
    found = observe(model, rows, extras=EXTRAS_ASKED)
    assert set(found.layers[max(found.layers)].arrays()) == {*FIELDS, *chain(*EXTRAS.values())}
    reference = Reference(model)
    reference.run(rows)
    assert list(found.layers) == [x.index for x in ModelSpec.from_path(model).layers]
    assert found.tokens == 26
    for index, layer in found.layers.items():
        assert layer.counts.sum() == 26 * ModelSpec.from_path(model).layer(index).top_k
        assert_close(layer, reference.statistics(index))


@every_family
def test_hidden_states_equal_the_stock_model(
    tiny_model: MakeModel, family: str, overrides: dict[str, Any]
) -> None:
    model = tiny_model(family, **overrides)
    rows = some_rows(9, 5)
    reference = Reference(model)
    reference.run(rows)
    stream = StreamedModel(model, ModelSpec.from_path(model))
    (batch,) = rows.batches()
    mask = torch.from_numpy(batch.attention_mask)
    (hidden,) = stream.embed([torch.from_numpy(batch.input_ids)])
    for index in range(3):
        with stream.layer(index), torch.no_grad():
            hidden = stream.run(hidden, mask)
        for place, i in enumerate(batch.indices):
            expected = reference.outputs[index][i]
            torch.testing.assert_close(
                hidden[place, : len(expected)], expected, rtol=1e-4, atol=2e-5
            )


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_padding_and_batches_do_not_matter(tiny_model: MakeModel, family: str) -> None:
    rows = some_rows(12, 3, 7, 7, 1)
    together = observe(tiny_model(family), rows)
    alone = observe(tiny_model(family), rows, batch_tokens=1)
    for index, layer in together.layers.items():
        assert_close(layer, alone.layers[index], rtol=1e-5)


def test_statistics_of_parts_add_up(tiny_model: MakeModel) -> None:
    model, rows = tiny_model("qwen3_moe"), some_rows(8, 6, 11)
    whole = observe(model, rows)
    parts = [observe(model, Rows(rows.token_ids[:1])), observe(model, Rows(rows.token_ids[1:]))]
    for index, layer in whole.layers.items():
        np.testing.assert_allclose(layer.sums, sum(p.layers[index].sums for p in parts), rtol=1e-5)


def test_fused_checkpoints_give_the_same(tiny_model: MakeModel, tmp_path: Path) -> None:
    classic = tiny_model("qwen2_moe")
    tensors = load_file(classic / "model.safetensors")
    for layer in range(3):
        at = f"model.layers.{layer}.mlp.experts."
        parts = {
            name: torch.stack([tensors.pop(f"{at}{e}.{name}.weight") for e in range(8)])
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{at}gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], 1)
        tensors[f"{at}down_proj"] = parts["down_proj"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(classic / "config.json", tmp_path)
    rows = some_rows(9, 5)
    one, other = observe(classic, rows), observe(tmp_path, rows)
    assert all(np.array_equal(one.layers[i].sums, other.layers[i].sums) for i in range(3))
    assert one.model != other.model


def test_layers_may_have_other_counts(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Layer 1 keeps the experts 0 to 4: per_layer_config, which stock classes do not build."""
    model = tiny_model("olmoe")
    tensors = load_file(model / "model.safetensors")
    gate = "model.layers.1.mlp.gate.weight"
    tensors[gate] = tensors[gate][:5].contiguous()
    kept = {
        k: v for k, v in tensors.items() if not any(f".1.mlp.experts.{e}." in k for e in (5, 6, 7))
    }
    save_file(kept, tmp_path / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    config["per_layer_config"] = {"1": {"num_experts": 5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = observe(tmp_path, some_rows(9, 5))
    assert [len(layer.counts) for layer in found.layers.values()] == [8, 5, 8]
    assert all(layer.counts.sum() == 28 for layer in found.layers.values())
    full = observe(model, some_rows(9, 5))
    assert np.array_equal(full.layers[0].sums, found.layers[0].sums)


def test_bfloat16(tiny_model: MakeModel) -> None:
    model, rows = tiny_model("deepseek_v3", dtype="bfloat16"), some_rows(30, 20)
    wide = observe(tiny_model("deepseek_v3"), rows)
    narrow = observe(model, rows)
    first = narrow.layers[1]
    assert first.counts.sum() == 100
    scores = first.saliency(1, 1, 1), wide.layers[1].saliency(1, 1, 1)
    np.testing.assert_allclose(*scores, rtol=0.15)


def test_progress_counts_up_to_the_end(tiny_model: MakeModel) -> None:
    seen: list[tuple[int, int]] = []
    observe(
        tiny_model("deepseek_v2"),
        some_rows(4, 4),
        batch_tokens=4,
        progress=lambda *step: seen.append(step),
    )
    assert seen == [(i, 6) for i in range(1, 7)]


def copy_with_config(model: Path, folder: Path, **fields: Any) -> Path:
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_refusals(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    rows = some_rows(3)
    quantised = copy_with_config(model, tmp_path / "a", quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=r"quantization_config \(fp8\)"):
        observe(quantised, rows)
    fewer = copy_with_config(model, tmp_path / "b", num_local_experts=7)
    with pytest.raises(CheckpointError, match="shape is"):
        observe(fewer, rows)
    with pytest.raises(ArchitectureError, match="model_type is 'gpt2'"):
        observe(copy_with_config(model, tmp_path / "c", model_type="gpt2"), rows)


def test_a_missing_or_broken_tensor_is_named(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = copy_with_config(tiny_model("mixtral"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    norm = tensors.pop("model.layers.1.input_layernorm.weight")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.input_layernorm\.weight is missing"
    ):
        observe(model, some_rows(3))
    tensors["model.layers.1.input_layernorm.weight"] = norm * float("nan")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="layer 1: hidden states hold NaN"):
        observe(model, some_rows(3))


@pytest.mark.parametrize(
    ("name", "variant"), [("mixtral_rand", "renorm_on."), ("qwen2moe_rand", "renorm_off.")]
)
def test_equals_the_official_reap_observer(shared: Path, name: str, variant: str) -> None:
    """The variant is the one with the model's own weights: Mixtral renormalises, Qwen2 does not."""
    golden = shared / "golden"
    found = observe(golden / "ckpt" / name, golden_rows(golden), extras=EXTRAS_ASKED)
    expected = load_file(golden / "reap" / f"{name}.safetensors")
    for i, layer in found.layers.items():
        at = f"L{i}."
        assert found.tokens == expected[f"{at}total_tokens"]
        assert layer.counts.tolist() == expected[f"{at}expert_frequency"].tolist()
        for key, value in {
            f"{variant}{at}reap": layer.saliency(1, 1, 1),
            f"{variant}{at}weighted_ean_sum": layer.saliency(0, 1, 1),
            f"{variant}{at}weighted_expert_frequency_sum": layer.saliency(0, 1, 0),
            f"{at}ean_sum": layer.saliency(0, 0, 1),
            f"{at}ean_mean": layer.saliency(1, 0, 1),
            f"{at}max_activations": layer.max_activation,
        }.items():
            np.testing.assert_allclose(value, expected[key].numpy(), rtol=1e-4, err_msg=key)
        for key, value in {
            f"{at}characteristic_activation": layer.gathered("dense_sums") / found.tokens,
            f"{at}routed_characteristic_activation": (
                layer.gathered("output_sums") / layer.counts[:, None]
            ),
        }.items():
            np.testing.assert_allclose(value, expected[key].numpy(), atol=1e-7, err_msg=key)


@pytest.mark.parametrize("name", ["mixtral_rand", "qwen2moe_rand"])
def test_similarity_of_logits_equals_the_official_one(shared: Path, name: str) -> None:
    """It is 1 - cosine there, taken for each of the two batches and averaged over their tokens."""
    golden = shared / "golden"
    rows = golden_rows(golden).token_ids
    batches = [
        observe(golden / "ckpt" / name, Rows(some), extras=["logits"])
        for some in (rows[:4], rows[4:])
    ]
    expected = load_file(golden / "reap" / f"{name}.safetensors")
    for i in batches[0].layers:
        found = np.zeros_like(batches[0].layers[i].gathered("logit_products"))
        for batch in batches:
            products = batch.layers[i].gathered("logit_products")
            norms = np.sqrt(np.diag(products))
            found += batch.tokens * (1 - products / np.outer(norms, norms))
        similarity = expected[f"L{i}.router_logit_similiarity"].numpy()
        tokens = sum(batch.tokens for batch in batches)
        np.testing.assert_allclose(found / tokens, similarity, atol=1e-6)


def golden_rows(golden: Path) -> Rows:
    tensors = load_file(golden / "calib_rand.safetensors")
    lengths = tensors["attention_mask"].sum(1).tolist()
    padded = [row[:n] for row, n in zip(tensors["input_ids"], lengths, strict=True)]
    return Rows(tuple(row.numpy() for row in [*padded, *tensors["input_ids_b2"]]))


def test_saved_statistics_come_back(tiny_model: MakeModel, tmp_path: Path) -> None:
    found = observe(tiny_model("mixtral"), some_rows(9))
    found.save(tmp_path / "s.safetensors")
    again = RoutingStatistics.load(tmp_path / "s.safetensors")
    assert again.calibration == some_rows(9).digest
    assert_close(found.layers[2], again.layers[2], rtol=0)
