"""The new config says what the plan says, to Liveprune and to stock transformers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from liveprune.pruning.architectures import ARCHITECTURES
from liveprune.pruning.checkpoint.apply_config import apply_config
from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_guards import check_plan

FAMILIES = sorted(ARCHITECTURES)


def base_config(family: str, experts: int = 8, top_k: int = 2, **fields: Any) -> dict[str, Any]:
    architecture = ARCHITECTURES[family]
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": list(architecture.classes),
        "torch_dtype": "bfloat16",
        "num_hidden_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 4,
        architecture.expert_size_key: 8,
        architecture.count_key: experts,
        "num_experts_per_tok": top_k,
        "rope_theta": 10000.0,
    }
    if family == "deepseek_v3":
        config |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    return {**config, **fields}


def pruned(spec: ModelSpec, counts: list[int], top_ks: list[int]) -> Plan:
    layers = [
        LayerPlan(base.index, base.experts, top_k, tuple(range(count)))
        for base, count, top_k in zip(spec.layers, counts, top_ks, strict=True)
    ]
    return plan_of(spec, layers)


def plan_of(spec: ModelSpec, layers: list[LayerPlan]) -> Plan:
    family = spec.architecture.model_type
    return Plan(family, spec.num_hidden_layers, tuple(layers), Lineage("test"), "org/base")


def test_a_uniform_plan_changes_two_scalars() -> None:
    config = base_config("mixtral")
    spec = ModelSpec.from_config(config)
    before = copy.deepcopy(config)
    plan = pruned(spec, [4] * 4, [1] * 4)
    result = apply_config(config, plan, spec, fingerprints={0: "aa", 1: "bb", 2: "cc", 3: "dd"})
    assert config == before
    assert result.pop("liveprune") == {
        "version": 1,
        "plan": plan.digest,
        "base_model": "org/base",
        "base_experts": {"0": 8, "1": 8, "2": 8, "3": 8},
        "fingerprints": {"0": "aa", "1": "bb", "2": "cc", "3": "dd"},
    }
    assert result == {**before, "num_local_experts": 4, "num_experts_per_tok": 1}


def test_every_key_that_stores_the_count_is_updated() -> None:
    config = base_config("qwen3_moe", num_experts=8)
    spec = ModelSpec.from_config(config)
    result = apply_config(config, pruned(spec, [5] * 4, [2] * 4), spec)
    assert (result["num_experts"], result["num_local_experts"]) == (5, 5)


def test_layers_that_differ_get_canonical_keys() -> None:
    """As Qwen3-MoE is published: under the alias, which stays the scalar's key."""
    config = base_config("qwen3_moe")
    config["num_experts"] = config.pop("num_local_experts")
    spec = ModelSpec.from_config(config)
    result = apply_config(config, pruned(spec, [5, 7, 7, 1], [2, 2, 1, 1]), spec)
    assert result["num_experts"] == 7
    assert "num_local_experts" not in result
    assert result["num_experts_per_tok"] == 2
    assert result["per_layer_config"] == {
        "0": {"num_local_experts": 5},
        "2": {"num_experts_per_tok": 1},
        "3": {"num_local_experts": 1, "num_experts_per_tok": 1},
    }


def test_router_maps_are_stated_even_when_square() -> None:
    config = base_config("mixtral", num_hidden_layers=2)
    spec = ModelSpec.from_config(config)
    matrix = np.eye(8, dtype=np.float32)
    layers = [
        LayerPlan(0, 8, 2, merge=matrix, router_map=matrix),
        LayerPlan(1, 8, 2, merge=matrix[:4], router_map=matrix[:4]),
    ]
    result = apply_config(config, plan_of(spec, layers), spec)
    assert result["liveprune"]["router_width"] == {"0": 8, "1": 8}
    assert result["liveprune"]["router_mapping"] == {"0": "router_map", "1": "router_map"}
    after = ModelSpec.from_config(result)
    assert [(x.experts, x.router_width, x.has_router_map) for x in after.layers] == [
        (8, 8, True),
        (4, 8, True),
    ]


def test_other_overrides_stay_and_ours_are_replaced() -> None:
    overrides = {
        "0": {"num_experts": 6, "sliding_window": 128},
        "2": {"num_local_experts": 5},
    }
    config = base_config("mixtral", per_layer_config=overrides)
    spec = ModelSpec.from_config(config)
    result = apply_config(config, pruned(spec, [3] * 4, [2] * 4), spec)
    assert result["per_layer_config"] == {"0": {"sliding_window": 128}}
    assert result["num_local_experts"] == 3


def test_lists_seen_in_the_wild_become_standard_keys() -> None:
    config = base_config("olmoe", num_experts_per_layer=[8, 6, 6, 8])
    spec = ModelSpec.from_config(config)
    result = apply_config(config, pruned(spec, [4, 4, 5, 4], [2] * 4), spec)
    assert "num_experts_per_layer" not in result
    assert result["per_layer_config"]["0"] == {"num_experts": 4}
    assert [x.experts for x in ModelSpec.from_config(result).layers] == [4, 4, 5, 4]
    assert result["liveprune"]["base_experts"] == {"0": 8, "1": 6, "2": 6, "3": 8}


def test_draft_layers_keep_their_count() -> None:
    config = base_config("deepseek_v3", num_nextn_predict_layers=1)
    spec = ModelSpec.from_config(config)
    once = apply_config(config, pruned(spec, [4] * 3, [2] * 3), spec)
    assert once["liveprune"]["mtp_experts"] == 8
    spec = ModelSpec.from_config(once)
    twice = apply_config(once, pruned(spec, [3] * 3, [2] * 3), spec)
    assert twice["liveprune"]["mtp_experts"] == 8


def quantised(names: Any, kept: tuple[int, ...] = (1, 2), **fields: Any) -> Any:
    config = base_config("qwen2_moe", quantization_config={"quant_method": "x", **names}, **fields)
    spec = ModelSpec.from_config(config)
    layers = [LayerPlan(x.index, x.experts, 2, kept) for x in spec.layers]
    return apply_config(config, plan_of(spec, layers), spec)["quantization_config"]


def test_ignore_lists_follow_their_experts() -> None:
    ignore = [
        "lm_head",
        "re:.*mlp.gate$",
        "model.layers.0.mlp.experts.1.up_proj",
        "model.layers.0.mlp.experts.2",
        "model.layers.3.mlp.experts.5.up_proj",
        "model.layers.9.mlp.experts.5.up_proj",
    ]
    table = {"model.layers.1.mlp.experts.2.up_proj": {"bits": 8}, "lm_head": {"bits": 4}}
    result = quantised({"modules_to_not_convert": ignore, "extra": {"layers": table}})
    assert result["modules_to_not_convert"] == [
        "lm_head",
        "re:.*mlp.gate$",
        "model.layers.0.mlp.experts.0.up_proj",
        "model.layers.0.mlp.experts.1",
        "model.layers.9.mlp.experts.5.up_proj",
    ]
    assert result["extra"]["layers"] == {
        "model.layers.1.mlp.experts.1.up_proj": {"bits": 8},
        "lm_head": {"bits": 4},
    }


@pytest.mark.parametrize(
    "name", [r"re:.*\.experts\.5\..*", "layers.0.mlp.experts.5", "*experts.3.up_proj"]
)
def test_experts_named_by_pattern_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match=r"names '.*'; expected the full name"):
        quantised({"ignore": [name]})
    everything = quantised({"ignore": [name]}, kept=tuple(range(8)))
    assert everything["ignore"] == [name]


@st.composite
def plans(draw: st.DrawFn) -> tuple[dict[str, Any], ModelSpec, Plan]:
    family = draw(st.sampled_from(FAMILIES))
    experts = draw(st.integers(2, 9))
    top_k = draw(st.integers(1, experts))
    config = base_config(family, experts, top_k, num_hidden_layers=draw(st.integers(2, 5)))
    spec = ModelSpec.from_config(config)
    counts = [draw(st.integers(spec.router.group_top, experts)) for _ in spec.layers]
    top_ks = [draw(st.integers(1, min(top_k, count))) for count in counts]
    return config, spec, pruned(spec, counts, top_ks)


def counts_of(spec: ModelSpec) -> list[tuple[int, int, int]]:
    return [(x.index, x.experts, x.top_k) for x in spec.layers]


@given(plans())
@settings(deadline=None)
def test_the_new_config_has_the_plans_counts(case: tuple[dict[str, Any], ModelSpec, Plan]) -> None:
    config, spec, plan = case
    check_plan(plan, spec)
    result = apply_config(config, plan, spec)
    after = ModelSpec.from_config(result)
    assert counts_of(after) == [(x.layer, x.kept_experts, x.top_k) for x in plan.layers]
    assert after.is_uniform == plan.is_uniform == ("per_layer_config" not in result)
    changed = {spec.architecture.count_key, "num_experts_per_tok", "per_layer_config", "liveprune"}
    assert {k: v for k, v in result.items() if k not in changed} == {
        k: v for k, v in config.items() if k not in changed
    }


@given(plans())
@settings(deadline=None)
def test_aliases_give_the_same_spec(case: tuple[dict[str, Any], ModelSpec, Plan]) -> None:
    config, spec, plan = case
    for alias in spec.architecture.count_aliases:
        other = dict(config)
        other[alias] = other.pop(spec.architecture.count_key)
        aliased = ModelSpec.from_config(other)
        assert counts_of(aliased) == counts_of(spec)
        result = apply_config(other, plan, aliased)
        expected = apply_config(config, plan, spec)
        assert counts_of(ModelSpec.from_config(result)) == counts_of(
            ModelSpec.from_config(expected)
        )
        assert result.get("per_layer_config") == expected.get("per_layer_config")


@given(plans())
@settings(deadline=None, max_examples=30)
def test_transformers_reads_the_same_counts(
    case: tuple[dict[str, Any], ModelSpec, Plan],
) -> None:
    config, spec, plan = case
    result = apply_config(config, plan, spec)
    fields = {k: v for k, v in result.items() if k not in ("architectures", "torch_dtype")}
    parsed = AutoConfig.for_model(**fields)
    for layer in plan.layers:
        own = parsed.per_layer_config[layer.layer]
        assert getattr(own, spec.architecture.count_key) == layer.kept_experts
        assert own.num_experts_per_tok == layer.top_k
