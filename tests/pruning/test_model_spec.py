from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from liveprune.pruning.architectures import ARCHITECTURES
from liveprune.pruning.errors import ArchitectureError, CheckpointError
from liveprune.pruning.model_spec import ModelSpec, MoELayer, Router, count_value, read_block

SIZES = {"num_hidden_layers": 4, "hidden_size": 32, "num_experts_per_tok": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 48},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 48},
    "qwen3_moe": {"num_local_experts": 8, "moe_intermediate_size": 48, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "intermediate_size": 48},
    "deepseek_v2": {"n_routed_experts": 8, "moe_intermediate_size": 48},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    },
}
FAMILIES = sorted(CONFIGS)
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


def mapped(mapping: dict[str, str], widths: dict[str, int] | None = None) -> dict[str, Any]:
    widths = dict.fromkeys(mapping, 16) if widths is None else widths
    return {"version": 1, "router_width": widths, "router_mapping": mapping}


def config(family: str, **changes: Any) -> dict[str, Any]:
    merged = {"model_type": family, **SIZES, **CONFIGS[family], **changes}
    return {key: value for key, value in merged.items() if value is not ...}


def counts(family: str, **changes: Any) -> dict[int, int]:
    spec = ModelSpec.from_config(config(family, **changes))
    return {layer.index: layer.experts for layer in spec.layers}


def transformers_config(family: str, **changes: Any) -> Any:
    rest = {"num_attention_heads": 4, "vocab_size": 16, "pad_token_id": 0}
    if family.startswith("deepseek"):
        rest |= LATENT
    return AutoConfig.for_model(family, **{**CONFIGS[family], **SIZES, **rest, **changes})


def test_every_family_is_covered() -> None:
    assert sorted(ARCHITECTURES) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_config(family: str) -> None:
    spec = ModelSpec.from_config(config(family))
    first = 1 if family == "deepseek_v3" else 0
    assert spec.layers == tuple(MoELayer(i, 8, 2, 8) for i in range(first, 4))
    assert (spec.num_hidden_layers, spec.hidden_size, spec.expert_size) == (4, 32, 48)
    assert spec.is_uniform
    assert spec.mtp_layers == (1 if family == "deepseek_v3" else 0)
    assert spec.layer(2).index == 2
    with pytest.raises(KeyError):
        spec.layer(4)


@pytest.mark.parametrize(
    ("family", "changes", "router"),
    [
        ("mixtral", {}, Router("softmax", renormalise=True)),
        ("mixtral", {"norm_topk_prob": False}, Router("softmax", renormalise=True)),
        ("qwen2_moe", {}, Router("softmax", renormalise=False)),
        ("qwen2_moe", {"norm_topk_prob": True}, Router("softmax", renormalise=True)),
        ("qwen3_moe", {}, Router("softmax", renormalise=True)),
        ("olmoe", {}, Router("softmax", renormalise=False)),
        ("deepseek_v2", {"n_group": 1}, Router("softmax", renormalise=False)),
        (
            "deepseek_v2",
            {"n_group": 4, "topk_group": 2, "topk_method": "greedy", "routed_scaling_factor": 16},
            Router("softmax", renormalise=False, scale=16.0),
        ),
        (
            "deepseek_v2",
            {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
            Router("softmax", renormalise=False, groups=4, top_groups=2, group_top=1),
        ),
        (
            "deepseek_v3",
            {},
            Router("sigmoid", renormalise=True, groups=4, top_groups=2, group_top=2, scale=2.5),
        ),
        # Moonlight: a V3 model without groups.
        (
            "deepseek_v3",
            {"n_group": 1, "topk_group": 1},
            Router("sigmoid", renormalise=True, group_top=2, scale=2.5),
        ),
    ],
)
def test_routers(family: str, changes: dict[str, Any], router: Router) -> None:
    assert ModelSpec.from_config(config(family, **changes)).router == router


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("qwen2_moe", {"mlp_only_layers": [0, 2]}, [1, 3]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, [1, 3]),
        ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1]),
        ("deepseek_v2", {"first_k_dense_replace": 1}, [1, 2, 3]),
        ("deepseek_v2", {"first_k_dense_replace": 0}, [0, 1, 2, 3]),
        ("deepseek_v3", {"first_k_dense_replace": 3}, [3]),
        ("mixtral", {"mlp_only_layers": [0], "first_k_dense_replace": 1}, [0, 1, 2, 3]),
    ],
)
def test_dense_layers_as_transformers_builds_them(
    family: str, changes: dict[str, Any], expected: list[int]
) -> None:
    made = transformers_config(family, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    built = [i for i, x in enumerate(model.model.layers) if hasattr(x.mlp, "experts")]
    assert built == expected
    assert [x.index for x in ModelSpec.from_config(config(family, **changes)).layers] == expected
    assert [x.index for x in ModelSpec.from_config(made.to_dict()).layers] == expected


def test_moe_layer_freq_counts_from_layer_zero() -> None:
    """As in DeepSeek's own modelling code; transformers leaves the key out."""
    assert list(counts("deepseek_v2", first_k_dense_replace=1, moe_layer_freq=2)) == [2]


@pytest.mark.parametrize("family", FAMILIES)
def test_per_layer_config_canonical_and_alias_keys_are_the_same(family: str) -> None:
    architecture = ARCHITECTURES[family]
    expected = {i: 4 if i == 2 else 8 for i in counts(family)}
    for key in (architecture.count_key, *architecture.count_aliases):
        assert counts(family, per_layer_config={"2": {key: 4}}) == expected
        # What transformers makes of it.
        made = transformers_config(family, per_layer_config={"2": {key: 4}})
        theirs = {i: getattr(made.per_layer_config[i], architecture.count_key) for i in expected}
        assert theirs == expected
        spec = ModelSpec.from_config(made.to_dict())
        assert {x.index: x.experts for x in spec.layers} == expected


def test_per_layer_top_k_and_its_clamp() -> None:
    overrides = {"1": {"num_experts_per_tok": 1}, "2": {"num_local_experts": 1}}
    spec = ModelSpec.from_config(config("mixtral", per_layer_config=overrides))
    assert [(x.experts, x.top_k) for x in spec.layers] == [(8, 2), (8, 1), (1, 1), (8, 2)]
    assert not spec.is_uniform


@pytest.mark.parametrize("key", ["num_experts_per_layer", "num_experts_by_block"])
def test_lists_of_counts(key: str) -> None:
    assert counts("mixtral", **{key: [8, 6, 5, 7]}) == {0: 8, 1: 6, 2: 5, 3: 7}
    # Over the layers with experts (MoEITS), or over all.
    assert counts("deepseek_v3", **{key: [4, 8, 8]}) == {1: 4, 2: 8, 3: 8}
    assert counts("deepseek_v3", **{key: [0, 4, 8, 8]}) == {1: 4, 2: 8, 3: 8}
    stated = {"0": 3, "1": 4, "2": 5, "3": 6}
    assert counts("qwen2_moe", **{key: stated}) == {0: 3, 1: 4, 2: 5, 3: 6}


def test_lists_and_objects_under_the_count_key() -> None:
    assert counts("mixtral", num_local_experts=[3, 4, 5, 6]) == {0: 3, 1: 4, 2: 5, 3: 6}
    stated = {"1": 4, "2": 8, "3": 4, "4": 8}  # 4 is the MTP layer
    assert counts("deepseek_v3", n_routed_experts=stated) == {1: 4, 2: 8, 3: 4}
    assert counts("mixtral", num_local_experts=..., num_experts=6) == {0: 6, 1: 6, 2: 6, 3: 6}


def test_the_block_states_router_maps() -> None:
    block = {"version": 1, "router_width": {"1": 8, "3": 4}}
    spec = ModelSpec.from_config(config("mixtral", num_local_experts=4, liveprune=block))
    assert [(x.experts, x.router_width, x.has_router_map) for x in spec.layers] == [
        (4, 4, False),
        (4, 8, True),
        (4, 4, False),
        (4, 4, True),  # a square map is a map
    ]
    assert not spec.is_uniform


def test_the_block_states_other_mappings() -> None:
    """Their gates choose among the rows that they keep: top-k may exceed the experts."""
    block = {
        "version": 1,
        "router_width": {"0": 8, "1": 8, "2": 2, "3": 8},
        "router_mapping": {"0": "expert_map", "1": "constants", "2": "expert_map"},
    }
    spec = ModelSpec.from_config(config("mixtral", num_local_experts=1, liveprune=block))
    assert [(x.top_k, x.candidates, x.mapping, x.has_router_map) for x in spec.layers] == [
        (2, 8, "expert_map", False),
        (2, 8, "constants", False),
        (2, 2, "expert_map", False),
        (1, 1, "router_map", True),  # as written before there were others
    ]
    assert not spec.is_uniform
    wide = config("mixtral", num_local_experts=1, num_experts_per_tok=9, liveprune=block)
    assert [x.top_k for x in ModelSpec.from_config(wide).layers] == [8, 8, 2, 1]


def test_groups_are_of_gate_rows() -> None:
    """Three experts do not split into four groups; the eight rows that choose them do."""
    widths = dict.fromkeys("123", 8)
    block = {"version": 1, "router_width": widths}
    for mapping in ("expert_map", "constants"):
        block["router_mapping"] = dict.fromkeys("123", mapping)
        made = config("deepseek_v3", n_routed_experts=3, liveprune=block)
        assert {x.experts for x in ModelSpec.from_config(made).layers} == {3}
    with pytest.raises(ArchitectureError, match="has 3 experts, expected a multiple"):
        ModelSpec.from_config(config("deepseek_v3", n_routed_experts=3))


def test_read_block() -> None:
    assert read_block({}) is None
    assert read_block({"liveprune": {"version": 1, "plan": "x"}}) == {"version": 1, "plan": "x"}


@pytest.mark.parametrize("block", [{"version": 2}, {"version": "1"}, {}, [], "x"])
def test_unknown_blocks_fail_closed(block: object) -> None:
    with pytest.raises(CheckpointError, match=r"liveprune\.version is .*; this release reads 1"):
        ModelSpec.from_config(config("mixtral", liveprune=block))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"num_hidden_layers": ...}, "found num_hidden_layers = None"),
        ("mixtral", {"hidden_size": "32"}, "found hidden_size = '32', expected a positive number"),
        ("mixtral", {"num_experts_per_tok": ...}, "found num_experts_per_tok = None"),
        ("mixtral", {"num_experts_per_tok": True}, "found num_experts_per_tok = True"),
        ("mixtral", {"num_local_experts": ...}, "found num_local_experts = None"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts of layer 0 = 0"),
        ("mixtral", {"intermediate_size": ...}, "found intermediate_size = None"),
        ("qwen2_moe", {"moe_intermediate_size": ...}, "found moe_intermediate_size = None"),
        ("mixtral", {"num_experts": 4}, "'num_local_experts': 8, 'num_experts': 4.*expected one"),
        (
            "mixtral",
            {"num_experts_per_layer": [8, 8, 8]},
            r"list of 3 expert counts; expected 4 \(layers with experts\) or 4 \(all layers\)",
        ),
        ("mixtral", {"num_experts_per_layer": [8, 8, 8, "8"]}, "of layer 3 = '8'"),
        ("mixtral", {"num_experts_per_layer": {"0": 8, "3": 8}}, r"miss the layers \[1, 2\]"),
        ("mixtral", {"num_experts_per_layer": {"a": 8}}, "expected an object by layer"),
        (
            "mixtral",
            {"num_experts_per_layer": [8, 8, 8, 8], "num_experts_by_block": [4, 4, 4, 4]},
            "expected one expert count",
        ),
        ("mixtral", {"per_layer_config": {"4": {}}}, r"states the layers \[4\], the model has 4"),
        ("mixtral", {"per_layer_config": {"-1": {}}}, "expected an object by layer"),
        ("mixtral", {"per_layer_config": [{}, {}]}, "expected an object by layer"),
        ("mixtral", {"per_layer_config": {"0": 4}}, "per_layer_config of layer 0 is 4"),
        ("mixtral", {"per_layer_config": {"0": {"num_experts": 0}}}, "of layer 0 = 0"),
        (
            "mixtral",
            {"per_layer_config": {"0": {"num_experts": 4, "num_local_experts": 5}}},
            "expected one expert count",
        ),
        (
            "mixtral",
            {"liveprune": {"version": 1, "router_width": {"0": "8"}}},
            "router_width of layer 0 = '8'",
        ),
        (
            "mixtral",
            {"liveprune": mapped({"1": "permutation"})},
            "router_mapping of layer 1 is 'permutation', expected one of router_map, expert_map, c",
        ),
        (
            "mixtral",
            {"liveprune": mapped({"0": "constants"}, {"1": 9})},
            "router_mapping of layer 0 is 'constants', expected .* and a router_width",
        ),
        ("mixtral", {"liveprune": mapped({"4": "constants"})}, "states the layers .*4"),
        (
            "mixtral",
            {"liveprune": mapped({"1": "constants"}, {"1": 8})},
            "router_width of layer 1 is 8, expected at least 9 with constants and 8 experts",
        ),
        (
            "mixtral",
            {"liveprune": mapped({"1": "expert_map"}, {"1": 7})},
            "router_width of layer 1 is 7, expected at least 8 with expert_map and 8 experts",
        ),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "no layer of this qwen2_moe has experts"),
        ("deepseek_v3", {"scoring_func": "tanh"}, "scoring_func is 'tanh'; expected 'softmax'"),
        ("deepseek_v3", {"n_group": ...}, "n_group not found; expected in every deepseek_v3"),
        ("deepseek_v3", {"first_k_dense_replace": ...}, "first_k_dense_replace not found"),
        (
            "deepseek_v3",
            {"n_group": 3},
            "has 8 experts, expected a multiple of n_group = 3",
        ),
        ("deepseek_v3", {"topk_group": 5}, "topk_group is 5, expected 1 to n_group = 4"),
        ("deepseek_v2", {"model_type": "deepseek"}, "model_type is 'deepseek'"),
    ],
)
def test_unusable_configs_are_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        ModelSpec.from_config(config(family, **changes))


def test_count_value_prefers_none_over_guessing() -> None:
    architecture = ARCHITECTURES["qwen3_moe"]
    assert count_value(architecture, {}) is None
    assert count_value(architecture, {"num_experts": 5, "num_local_experts": None}) == 5
    assert count_value(architecture, {"num_experts": 5, "num_local_experts": 5}) == 5


def test_from_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not found; expected a checkpoint"):
        ModelSpec.from_path(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        ModelSpec.from_path(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="found list, expected an object"):
        ModelSpec.from_path(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config("olmoe")))
    assert len(ModelSpec.from_path(tmp_path).layers) == 4
