from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from liveprune.pruning.errors import ArchitectureError, CheckpointError, EngineError
from liveprune.pruning.evaluation import transformers_engine
from liveprune.pruning.evaluation.carried_out import carried_out
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.evaluation.transformers_engine import TransformersEngine
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from tests import reference
from tests.checkpoints import edited, make_plan, merge_plan
from tests.models import FAMILIES

Family = Callable[..., Path]
GROUPS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "deepseek_v3": {"n_group": 2, "topk_group": 1},
}
ROWS = [
    TokenRow((5, 9, 31, 7), (80, 12, 2)),
    TokenRow((44,), (6,)),
    TokenRow(tuple(range(20, 60)), (61, 62, 63, 64, 2)),
    TokenRow((70, 71, 72), (73,) * 9),
    TokenRow((33, 34), (35, 36)),
]


def plans_of(family: str, model: Path) -> list[Plan]:
    """Slices of other counts and top-k in each layer; merges; router maps where allowed."""
    layers = len(ModelSpec.from_path(model).layers)
    uneven = [[0, 1, 2, 4, 5, 6], [0, 3, 5, 6], [0, 2, 4, 7]][:layers]
    plans = [
        make_plan(model, uneven),
        make_plan(model, uneven, top_k=1),
        merge_plan(model, 4, kept=(1, 3, 4, 6)),
    ]
    if family in ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe"):
        plans.append(merge_plan(model, 3, router_map=True))
    return plans


def model_of(family: str, tiny_model: Family) -> Path:
    return tiny_model(family, **GROUPS.get(family, {}))


def expected(model: Any, full: Any | None = None) -> AnswerScores:
    """One row at a time, without padding, in float64; overlap and divergence token by token."""
    predicted, logprobs, overlap, divergence = [], [], [], []
    for row in ROWS:
        ids = torch.tensor([row.prompt + row.answer])
        with torch.no_grad():
            logs = [torch.log_softmax(x(ids).logits[0].double(), -1) for x in (model, full) if x]
        for i, token in enumerate(row.answer, len(row.prompt) - 1):
            q = logs[0][i]
            predicted.append(int(q.argmax()))
            logprobs.append(float(q[token]))
            p = logs[-1][i]
            pairs = list(zip(p.exp().tolist(), q.exp().tolist(), strict=True))
            overlap.append(sum(min(a, b) for a, b in pairs))
            divergence.append(sum(a * np.log(a / b) for a, b in pairs))
    return AnswerScores(*map(np.array, (predicted, logprobs, overlap, divergence)))


def assert_scores(actual: AnswerScores, wanted: AnswerScores, *, against_full: bool) -> None:
    np.testing.assert_array_equal(actual.predicted, wanted.predicted)
    np.testing.assert_allclose(actual.logprobs, wanted.logprobs, rtol=0, atol=1e-4)
    if not against_full:
        assert actual.overlap is actual.divergence is None
        return
    assert actual.overlap is not None
    assert actual.divergence is not None
    np.testing.assert_allclose(actual.overlap, wanted.overlap, rtol=0, atol=1e-4)
    np.testing.assert_allclose(actual.divergence, wanted.divergence, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_a_model_with_experts_removed(family: str, tiny_model: Family) -> None:
    """Rows apart against all in one batch; the full model asked again after all plans."""
    model = model_of(family, tiny_model)
    plans = plans_of(family, model)
    found = TransformersEngine(model).score([None, *plans, None], ROWS)
    full = reference.load(model)
    models = [full, *(reference.pruned_model(model, plan) for plan in plans), full]
    for actual, edited_model in zip(found, models, strict=True):
        assert_scores(actual, expected(edited_model), against_full=False)
    logprobs = [x.logprobs for x in found[:-1]]
    assert all(not np.allclose(a, logprobs[0], atol=1e-2) for a in logprobs[1:])


def test_comparison_with_the_full_model(
    tiny_model: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mixtral")
    plans = plans_of("mixtral", model)
    full = reference.load(model)
    wanted = [expected(full, full)]
    wanted += [expected(reference.pruned_model(model, plan), full) for plan in plans]
    for bound in (1 << 30, 4 * 128 * 8):  # all at once; eight answer tokens at a time
        monkeypatch.setattr(transformers_engine, "FULL_BYTES", bound)
        engine = TransformersEngine(model, batch_rows=2)
        assert len(engine._parts(ROWS, against_full=True)) == (1 if bound > 1e6 else 2)
        found = engine.score([None, *plans], ROWS, against_full=True)
        for actual, of_plan in zip(found, wanted, strict=True):
            assert_scores(actual, of_plan, against_full=True)
        assert found[0].overlap == pytest.approx(np.ones(20), abs=1e-5)
        assert found[0].divergence is not None
        assert (found[0].divergence == 0).all()
        assert found[1].divergence is not None
        assert found[1].divergence.min() > 1e-3


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2"])
def test_the_identity_as_merge_and_router_map_is_the_full_model(
    family: str, tiny_model: Family
) -> None:
    """With scaled weights, too, and whether or not they are divided by their sum."""
    overrides = {"routed_scaling_factor": 1.5} if family == "deepseek_v2" else {}
    model = tiny_model(family, **overrides)
    spec = ModelSpec.from_path(model)
    identity = np.eye(8, dtype=np.float32)
    layers = [
        LayerPlan(x.index, 8, x.top_k, merge=identity, router_map=identity) for x in spec.layers
    ]
    plan = Plan(family, spec.num_hidden_layers, tuple(layers), Lineage("test"))
    full, mapped = TransformersEngine(model).score([None, plan], ROWS)
    np.testing.assert_allclose(mapped.logprobs, full.logprobs, rtol=0, atol=1e-5)


def test_batches_and_padding_change_nothing(tiny_model: Family) -> None:
    model = tiny_model("qwen3_moe")
    plans = [None, *plans_of("qwen3_moe", model)]
    one, two, all_rows = (
        TransformersEngine(model, batch_rows=n).score(plans, ROWS, against_full=True)
        for n in (1, 2, 32)
    )
    for others in (two, all_rows):
        for a, b in zip(one, others, strict=True):
            assert_scores(a, b, against_full=True)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_generation_equals_greedy_decoding_row_by_row(family: str, tiny_model: Family) -> None:
    model = model_of(family, tiny_model)
    plans = plans_of(family, model)
    prompts = [row.prompt for row in ROWS]
    models = [reference.load(model), *(reference.pruned_model(model, plan) for plan in plans)]
    wanted = [[reference.greedy(x, list(p), 12) for p in prompts] for x in models]
    # A token that occurs in the middle of one answer, and one that occurs nowhere.
    end = {wanted[0][0][5], 127}
    for batch_rows in (1, 32):
        engine = TransformersEngine(model, batch_rows=batch_rows)
        endless = engine.generate([None, *plans], prompts, max_tokens=12, end=())
        assert [[list(x) for x in of_plan] for of_plan in endless] == wanted
        ended = engine.generate([None, *plans], prompts, max_tokens=12, end=end)
        for answers, of_plan in zip(ended, wanted, strict=True):
            assert list(answers) == [until(x, end) for x in of_plan]
    assert len(ended[0][0]) <= 6


def until(tokens: list[int], end: set[int]) -> tuple[int, ...]:
    places = [i for i, token in enumerate(tokens) if token in end]
    return tuple(tokens[: places[0] + 1] if places else tokens)


def test_sampling_defaults_of_the_checkpoint_are_not_used(
    tiny_model: Family, tmp_path: Path
) -> None:
    model = edited(tiny_model("mixtral"), tmp_path / "penalised")
    defaults = {"repetition_penalty": 5.0, "eos_token_id": 2, "max_length": 20}
    (model / "generation_config.json").write_text(json.dumps(defaults))
    prompt = ROWS[2].prompt
    (answer,) = TransformersEngine(model).generate([None], [prompt], max_tokens=8, end=())[0]
    assert list(answer) == reference.greedy(reference.load(model), list(prompt), 8)


def test_the_full_model_comes_back_after_an_error(
    tiny_model: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("deepseek_v3", **GROUPS["deepseek_v3"])
    engine = TransformersEngine(model)
    plan = plans_of("deepseek_v3", model)[1]
    gate = engine._model.model.layers[2].mlp.gate
    before = {id(x) for x in (*engine._model.parameters(), *engine._model.buffers())}
    (first,) = engine.score([None], ROWS)
    with monkeypatch.context() as patched:

        def fail(_: Any) -> Any:
            assert (gate.top_k, gate.num_experts, len(gate.weight)) == (1, 4, 4)
            raise RuntimeError("out of memory")

        patched.setattr(engine._model.lm_head, "forward", fail)
        with pytest.raises(EngineError, match=f"plan {plan.digest}: .* out of memory"):
            engine.score([plan], ROWS)
    assert {id(x) for x in (*engine._model.parameters(), *engine._model.buffers())} == before
    assert (gate.top_k, gate.num_experts) == (2, 8)
    (again,) = engine.score([None], ROWS)
    np.testing.assert_array_equal(first.logprobs, again.logprobs)


def test_router_maps_leave_no_hook_behind(tiny_model: Family) -> None:
    model = tiny_model("mixtral")
    engine = TransformersEngine(model)
    (first,) = engine.score([None], ROWS)
    engine.score([merge_plan(model, 3, router_map=True)], ROWS)
    assert not any(x._forward_hooks for x in engine._model.modules())
    (again,) = engine.score([None], ROWS)
    np.testing.assert_array_equal(first.logprobs, again.logprobs)


def test_values_that_are_not_finite_are_returned(tiny_model: Family) -> None:
    """Merged weights beyond the range of the dtype; the next plan does not feel it."""
    model = tiny_model("mixtral")
    huge = [
        LayerPlan(i, 8, 1, kept=(0,), merge=np.full((1, 8), 3e38, np.float32)) for i in range(3)
    ]
    broken = Plan("mixtral", 3, tuple(huge), Lineage("test"))
    first, second = TransformersEngine(model).score([broken, None], ROWS, against_full=True)
    assert first.overlap is not None
    assert np.isnan(first.logprobs).all()
    assert np.isnan(first.overlap).all()
    assert np.isfinite(second.logprobs).all()


def test_refusals(tiny_model: Family, tmp_path: Path) -> None:
    model = tiny_model("mixtral", max_position_embeddings=16)
    engine = TransformersEngine(model)
    with pytest.raises(EngineError, match=r"row 1: found 17 tokens .* at most 16"):
        engine.score([None], [ROWS[0], TokenRow((5,) * 12, (6,) * 5)])
    with pytest.raises(EngineError, match="row 0: found 17 tokens"):
        engine.generate([None], [(5,) * 12], max_tokens=5, end=())
    other = make_plan(tiny_model("mixtral", num_hidden_layers=2), [[0, 1]])
    with pytest.raises(EngineError, match=f"plan {other.digest}: .* 2 layers, the model has 3"):
        engine.score([None, other], ROWS[:1])
    with pytest.raises(EngineError, match="dtype is 'int4', expected one of float32"):
        TransformersEngine(model, dtype="int4")
    with pytest.raises(EngineError, match="batch_rows is 0"):
        TransformersEngine(model, batch_rows=0)
    uneven = edited(model, tmp_path / "uneven", num_local_experts=[8, 8, 4])
    with pytest.raises(ArchitectureError, match="layers differ"):
        TransformersEngine(uneven)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((model / "config.json").read_text())
    with pytest.raises(CheckpointError, match="bare: transformers cannot load it"):
        TransformersEngine(tmp_path / "bare")


def test_bfloat16_merges_are_rounded_once(tiny_model: Family) -> None:
    model = tiny_model("mixtral")
    engine = TransformersEngine(model, dtype="bfloat16")
    plan = merge_plan(model, 3, router_map=True)
    experts = engine._model.model.layers[1].mlp.experts
    base = experts.down_proj.clone().float()
    with carried_out(engine._model, engine._spec, plan):
        merged = experts.down_proj.clone()
    merge = torch.tensor(plan.layer(1).merge)
    exact = sum(merge[2, i].double() * base[i].double() for i in range(8))
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged[2].double(), exact, rtol=2**-8, atol=1e-6)


KINDS = {"onehot": 5e-5, "onehot_unsorted": 5e-5, "continuous_nonneg": 5e-5, "continuous": 1e-3}
"""Tolerance of the logits (golden/eep/README.md)."""


@pytest.mark.parametrize("kind", KINDS)
def test_merges_equal_the_official_implementation(shared: Path, kind: str) -> None:
    """Coefficients of EEP's own code, carried out here, give its logits."""
    golden = shared / "golden"
    model = golden / "ckpt/mixtral_rand"
    held = load_file(golden / f"eep/mixtral_rand.b4.{kind}.coeff.safetensors")
    names = [(f"layers.{i}", f"transfer.{i}") for i in range(2)] + [("others", "others_transfer")]
    layers = [
        LayerPlan(i, 8, 2, merge=held[merge].numpy(), router_map=held[mapped].numpy())
        for i, (merge, mapped) in enumerate(names)
    ]
    plan = Plan("mixtral", 3, tuple(layers), Lineage("eep"))
    logits = load_file(golden / f"eep/mixtral_rand.b4.{kind}.logits.safetensors")["logits"]
    inputs = load_file(golden / "calib_rand.safetensors")
    real = inputs["attention_mask"].bool()
    engine = TransformersEngine(model)
    with torch.no_grad(), carried_out(engine._model, engine._spec, plan):
        actual = engine._model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(actual[real], logits[real], rtol=0, atol=KINDS[kind])
    rows, wanted = [], []
    for ids, mask, of_row in zip(inputs["input_ids"], real, logits, strict=True):
        tokens = ids[mask].tolist()
        rows.append(TokenRow(tuple(tokens[:4]), tuple(tokens[4:])))
        logprobs = of_row[mask].log_softmax(-1)
        wanted += [float(logprobs[i - 1, tokens[i]]) for i in range(4, len(tokens))]
    (scores,) = engine.score([plan], rows)
    np.testing.assert_allclose(scores.logprobs, wanted, rtol=0, atol=2 * KINDS[kind])
