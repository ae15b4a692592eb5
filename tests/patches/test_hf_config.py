from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedConfig

from liveprune.patches.hf_config import LAYERS_ATTRIBUTE, adapt_config, wrap_get_config
from liveprune.pruning.architectures import ARCHITECTURES
from liveprune.pruning.errors import ArchitectureError, CheckpointError
from tests.patches.configs import FAMILIES, raw_config

Read = Callable[[dict[str, Any]], Any]
TOP_K = "num_experts_per_tok"


def moe_layers(family: str) -> list[int]:
    return [1, 2, 3] if family.startswith("deepseek") else [0, 1, 2, 3]


def layers(config: Any) -> Any:
    return getattr(config, LAYERS_ATTRIBUTE, None)


def test_every_family_is_covered() -> None:
    assert FAMILIES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_canonical_and_alias_keys_give_the_same_table(family: str, read_config: Read) -> None:
    """Layer 2 has fewer experts than the model's top-k and states none of its own."""
    architecture = ARCHITECTURES[family]
    keys = (architecture.count_key, *architecture.count_aliases)
    for key in keys:
        overrides = {"1": {key: 5, TOP_K: 1}, "2": {key: 1}, "3": {key: 7}}
        config = read_config(raw_config(family, per_layer_config=overrides))
        adapt_config(config)
        expected = {"0": [8, 2, 0, ""], "1": [5, 1, 0, ""], "2": [1, 1, 0, ""], "3": [7, 2, 0, ""]}
        assert layers(config) == {str(i): expected[str(i)] for i in moe_layers(family)}
        assert config.to_dict().get("per_layer_config") is None
        # vLLM reads whichever name its model code uses.
        most = max(expected[str(i)][0] for i in moe_layers(family))
        assert {getattr(config, name) for name in keys} == {most}
        assert getattr(config, TOP_K) == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", ["num_experts_per_layer", "n_routed_experts_per_layer"])
def test_lists_give_the_same_table(family: str, key: str, read_config: Read) -> None:
    counts = [5, 7, 1, 3][-len(moe_layers(family)) :]
    config = read_config(raw_config(family, **{key: counts}))
    adapt_config(config)
    assert layers(config) == {
        str(i): [n, min(2, n), 0, ""] for i, n in zip(moe_layers(family), counts, strict=True)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_keyed_by_layer_are_read(family: str, read_config: Read) -> None:
    stated = {str(i): i + 2 for i in moe_layers(family)}
    config = read_config(raw_config(family, num_experts_by_block=stated))
    adapt_config(config)
    assert layers(config) == {i: [n, 2, 0, ""] for i, n in stated.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_overrides_that_agree_become_a_plain_config(family: str, read_config: Read) -> None:
    architecture = ARCHITECTURES[family]
    overrides = {str(i): {architecture.count_key: 5, TOP_K: 1} for i in moe_layers(family)}
    config = read_config(raw_config(family, per_layer_config=overrides))
    adapt_config(config)
    assert layers(config) is None
    assert config.to_dict().get("per_layer_config") is None
    assert (getattr(config, architecture.count_key), getattr(config, TOP_K)) == (5, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_config_is_untouched(family: str, read_config: Read) -> None:
    config = read_config(raw_config(family))
    before, attributes = copy.deepcopy(config.to_dict()), set(vars(config))
    adapt_config(config)
    assert config.to_dict() == before
    assert set(vars(config)) == attributes


def test_unknown_families_are_untouched(read_config: Read) -> None:
    raw = {"model_type": "llama", "liveprune": {"version": 99}, "num_experts_per_layer": [1]}
    config = read_config(raw)
    before = copy.deepcopy(config.to_dict())
    adapt_config(config)
    assert config.to_dict() == before


def test_router_maps_are_told_by_the_block_also_square_ones(read_config: Read) -> None:
    config = read_config(
        raw_config(
            "mixtral",
            per_layer_config={"0": {"num_local_experts": 4}},
            liveprune={"version": 1, "router_width": {"0": 8, "1": 8}},
        )
    )
    adapt_config(config)
    assert layers(config) == {
        "0": [4, 2, 8, "router_map"],
        "1": [8, 2, 8, "router_map"],
        "2": [8, 2, 0, ""],
        "3": [8, 2, 0, ""],
    }


def test_uniform_counts_with_a_router_map_need_the_table(read_config: Read) -> None:
    widths = {str(i): 8 for i in range(4)}
    raw = raw_config("mixtral", num_local_experts=4)
    config = read_config({**raw, "liveprune": {"version": 1, "router_width": widths}})
    adapt_config(config)
    assert layers(config) == {str(i): [4, 2, 8, "router_map"] for i in range(4)}


def test_the_table_travels_to_other_processes(read_config: Read) -> None:
    """vLLM pickles the config for its workers, copies it, and hashes its JSON for compiled code."""
    raw = raw_config("mixtral", num_experts_per_layer=[5, 7, 1, 3])
    config, other = read_config(raw), read_config({**raw, "num_experts_per_layer": [7, 5, 1, 3]})
    adapt_config(config)
    adapt_config(other)
    assert layers(pickle.loads(pickle.dumps(config))) == layers(config)  # noqa: S301 - our own
    assert layers(copy.deepcopy(config)) == layers(config)
    assert config.to_json_string() != other.to_json_string()


def test_other_attributes_are_refused_by_layer(read_config: Read) -> None:
    overrides = {"2": {"num_local_experts": 5, "intermediate_size": 16, "hidden_act": "gelu"}}
    config = read_config(raw_config("mixtral", per_layer_config=overrides))
    with pytest.raises(CheckpointError) as caught:
        adapt_config(config)
    assert str(caught.value) == (
        "config.json: per_layer_config of layer 2 holds ['hidden_act', 'intermediate_size']; "
        "expected only ['num_experts', 'num_experts_per_tok', 'num_local_experts']"
    )


def test_unknown_block_version_is_refused(read_config: Read) -> None:
    config = read_config(raw_config("mixtral", liveprune={"version": 2}))
    with pytest.raises(CheckpointError, match=r"liveprune\.version is 2; this release reads 1"):
        adapt_config(config)


def test_contradicting_keys_are_refused(read_config: Read) -> None:
    overrides = {"1": {"num_local_experts": 5, "num_experts": 6}}
    config = read_config(raw_config("mixtral", per_layer_config=overrides))
    with pytest.raises(ArchitectureError, match="expected one expert count"):
        adapt_config(config)


def test_get_config_is_adapted_and_passed_on(read_config: Read) -> None:
    config = read_config(raw_config("mixtral", num_experts_per_layer=[5, 7, 1, 3]))
    seen = []

    def get_config(*args: Any, **kwargs: Any) -> PreTrainedConfig:
        seen.append((args, kwargs))
        return config

    assert wrap_get_config(get_config)("model", "x", revision="r") is config
    assert seen == [(("model", "x"), {"revision": "r"})]
    assert layers(config) is not None
