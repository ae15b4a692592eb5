"""Losses of sets by Gram matrices against blocks whose experts are physically removed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from liveprune.pruning.calibration import layer_outputs
from liveprune.pruning.calibration.layer_outputs import LayerOutputs, observe_outputs
from liveprune.pruning.calibration.rows import Rows
from liveprune.pruning.calibration.streamed import StreamedModel
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.methods.expert_sets import masks
from liveprune.pruning.model_spec import ModelSpec, Router
from tests.pruning.removed_experts import Blocks

MakeModel = Callable[..., Path]
LAYER = 2
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("qwen2_moe", {}),
    ("qwen3_moe", {}),
    ("olmoe", {"num_experts_per_tok": 3}),
    ("deepseek_v2", {}),
    ("deepseek_v3", {"n_group": 2, "topk_group": 1}),
]
SETS = [(0, 1, 4, 5), (1, 3, 6, 7), (0, 2, 3, 4, 5, 6), tuple(range(8))]


def some_rows(*lengths: int) -> Rows:
    generator = np.random.default_rng(0)
    return Rows(tuple(generator.integers(0, 128, n) for n in lengths))


def outputs_of(model: Path, rows: Rows, batch_tokens: int, index: int = LAYER) -> LayerOutputs:
    spec = ModelSpec.from_path(model)
    stream = StreamedModel(model, spec)
    batches = rows.batches(batch_tokens)
    hidden = stream.embed([torch.from_numpy(batch.input_ids) for batch in batches])
    with torch.inference_mode():
        for i in range(index):
            with stream.layer(i):
                hidden = [
                    stream.advance(x, torch.from_numpy(batch.attention_mask), i)
                    for x, batch in zip(hidden, batches, strict=True)
                ]
        with stream.layer(index) as layer:
            return observe_outputs(stream, layer, spec.layer(index), batches, hidden)


@pytest.mark.parametrize(("family", "overrides"), CASES)
@pytest.mark.parametrize("top_k", [None, 1])
def test_equals_blocks_without_the_experts(
    tiny_model: MakeModel, family: str, overrides: dict[str, Any], top_k: int | None
) -> None:
    """The blocks run in float64."""
    model = tiny_model(family, **overrides)
    rows = some_rows(9, 5, 12, 3)
    k = top_k or ModelSpec.from_path(model).layers[0].top_k
    sets = [x for x in SETS if len(x) != 6 or not overrides.get("n_group")]
    found = outputs_of(model, rows, 20).losses(masks(sets, 8), k)
    blocks = Blocks(model, rows)
    expected = [blocks.loss(LAYER, kept, k, rows.batches(20)) for kept in sets]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (found[-1] < 1e-5) == (top_k is None)


def test_padding_does_not_matter_and_batches_do(tiny_model: MakeModel) -> None:
    model, kept = tiny_model("mixtral"), masks(SETS, 8)
    rows = some_rows(12, 3, 7, 7, 1)
    together, alone = (outputs_of(model, rows, n) for n in (1000, 1))
    assert together.batches == (30,)
    assert sorted(alone.batches) == [1, 3, 7, 7, 12]
    # Norms of the parts: their squares add up to the square of the whole.
    parts = [outputs_of(model, Rows((row,)), 1000).losses(kept, 2) for row in rows.token_ids]
    np.testing.assert_allclose(alone.losses(kept, 2), sum(parts), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        together.losses(kept, 2), np.sqrt(sum(x**2 for x in parts)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["OUTPUT_BYTES", "SCORING_BYTES"])
def test_pieces_do_not_matter(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, kept, rows = tiny_model("qwen2_moe"), masks(SETS, 8), some_rows(9, 5, 12)
    whole = outputs_of(model, rows, 20).losses(kept, 2)
    monkeypatch.setattr(layer_outputs, name, 5000)
    np.testing.assert_allclose(outputs_of(model, rows, 20).losses(kept, 2), whole, rtol=1e-5)


def test_more_tokens_than_fit_are_thinned_evenly(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = tiny_model("mixtral"), some_rows(9, 5, 12)
    batches = rows.batches(20)
    assert [b.input_ids.shape for b in batches] == [(1, 12), (2, 9)]
    whole = outputs_of(model, rows, 20)
    # Of 26 tokens 9 Gram matrices fit: every third one, counted over the batches.
    monkeypatch.setattr(layer_outputs, "GRAM_BYTES", 9 * 64 * 4)
    thin = outputs_of(model, rows, 20)
    assert thin.batches == (4, 5)
    assert thin.grams.shape == (9, 8, 8)
    torch.testing.assert_close(thin.grams, whole.grams[::3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(thin.logits, whole.logits[::3])


def test_by_hand() -> None:
    """Two experts, top-1, f = (3, 0) and (0, 4): who loses the first gets a change of (-3, 4)."""
    outputs = LayerOutputs(
        logits=torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]),
        grams=torch.tensor([[9.0, 0.0], [0.0, 16.0]]).expand(3, 2, 2),
        batches=(2, 1),
        router=Router("softmax", renormalise=True),
        top_k=1,
        bias=None,
    )
    kept = torch.tensor([[True, True], [False, True], [True, False]])
    np.testing.assert_allclose(outputs.losses(kept, 1), [0, 10, 5])


def test_drift_is_part_of_every_loss() -> None:
    """The second vector of each token is what the block should give more of: (0, 2)."""
    outputs = LayerOutputs(
        logits=torch.zeros(1, 1),
        grams=torch.tensor([[[9.0, 0.0], [0.0, 4.0]]]),
        batches=(1,),
        router=Router("softmax", renormalise=True),
        top_k=1,
        bias=None,
    )
    assert outputs.losses(torch.tensor([[True]]), 1).tolist() == [2]


def test_precision(tiny_model: MakeModel) -> None:
    """Against float64 weights and sums, over sets that change little and much."""
    outputs = outputs_of(tiny_model("qwen3_moe"), some_rows(40, 30), 20)
    sets = list(itertools.combinations(range(8), 6))
    wide = LayerOutputs(
        outputs.logits.double(),
        outputs.grams.double(),
        outputs.batches,
        outputs.router,
        outputs.top_k,
        None,
    )
    expected = [plain_loss(wide, kept) for kept in sets]
    np.testing.assert_allclose(outputs.losses(masks(sets, 8), 2), expected, rtol=1e-5)


def plain_loss(outputs: LayerOutputs, kept: Sequence[int]) -> float:
    """Token by token, of a router that renormalises its top-2."""
    total, start = 0.0, 0
    for count in outputs.batches:
        square = 0.0
        for t in range(start, start + count):
            change = top_two(outputs.logits[t], kept) - top_two(outputs.logits[t], range(8))
            square += float(change @ outputs.grams[t] @ change)
        total += square**0.5
        start += count
    return total


def top_two(logits: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    weights = torch.zeros(8, dtype=torch.float64)
    best = sorted(kept, key=lambda e: -float(logits[e]))[:2]
    weights[best] = logits[best].softmax(0)
    return weights


def test_experts_that_overflow_are_named(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Expert 3 is infinite, but the router never asks for it."""
    model = tiny_model("mixtral")
    tensors = load_file(model / "model.safetensors")
    block = "model.layers.0.block_sparse_moe."
    # All hidden states have a positive first entry, and the gate looks at nothing else.
    gate = torch.zeros_like(tensors[f"{block}gate.weight"])
    gate[:, 0] = torch.tensor([1.0, 1, 1, -1e4, 1, 1, 1, 1])
    tensors[f"{block}gate.weight"] = gate
    tensors["model.embed_tokens.weight"][:, 0] = 50.0
    tensors[f"{block}experts.3.w2.weight"].fill_(3e38)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="layer 0: experts' outputs over all tokens hold"):
        outputs_of(tmp_path, some_rows(9), 20, index=0)
