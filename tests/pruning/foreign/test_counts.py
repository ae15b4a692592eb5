from __future__ import annotations

import json
from pathlib import Path

import pytest

from liveprune.pruning.errors import ArchitectureError, PlanError
from liveprune.pruning.foreign import read_counts
from liveprune.pruning.model_spec import ModelSpec

CONFIG = {
    "model_type": "deepseek_v2",
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 10,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
SPEC = ModelSpec.from_config(CONFIG)


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content",
    [
        [4, 6, 8],
        {"1": 4, "2": 6, "3": 8},
        {"3": 8, "2": 6, "1": 4},
        {"num_experts_per_layer": [4, 6, 8]},
        {"num_experts_per_layer": {"1": 4, "2": 6, "3": 8}, "hidden_size": 32},
        {"num_experts_by_block": [4, 6, 8]},
        {"n_routed_experts_per_layer": [4, 6, 8]},
        {**CONFIG, "num_experts_by_block": [4, 6, 8]},
        {
            **CONFIG,
            "n_routed_experts": 8,
            "per_layer_config": {"1": {"n_routed_experts": 4}, "2": {"num_experts": 6}},
        },
    ],
)
def test_accepted_forms(tmp_path: Path, content: object) -> None:
    path = write(tmp_path / "counts.json", content)
    assert read_counts(path) == [4, 6, 8]
    assert read_counts(path, SPEC) == [4, 6, 8]


def test_a_model_tells_dense_layers_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "counts.json", [0, 4, 6, 8])
    assert read_counts(path, SPEC) == [4, 6, 8]
    with pytest.raises(PlanError, match=r"found the counts \[0\], expected numbers from 1"):
        read_counts(path)


def test_numeric_keys_are_ordered_as_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "counts.json", {str(i): i + 1 for i in (10, 9, 2)})
    assert read_counts(path) == [3, 10, 11]


def test_counts_that_do_not_fit_the_model(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="list of 5 expert counts; expected 3"):
        read_counts(write(tmp_path / "a.json", [4] * 5), SPEC)
    with pytest.raises(ArchitectureError, match=r"miss the layers \[3\]"):
        read_counts(write(tmp_path / "b.json", {"1": 4, "2": 4}), SPEC)
    other = {**CONFIG, "first_k_dense_replace": 2}
    with pytest.raises(PlanError, match=r"has experts in the layers \[2, 3\], the model in \[1, 2"):
        read_counts(write(tmp_path / "c.json", other), SPEC)


@pytest.mark.parametrize(
    "content", [{}, [], 3, "x", [1.5], [True], ["4"], {"a": 4}, {"num_experts_per_layer": 4}]
)
def test_other_json_states_no_counts(tmp_path: Path, content: object) -> None:
    path = write(tmp_path / "counts.json", content)
    with pytest.raises(PlanError, match="found no expert counts, expected a list"):
        read_counts(path)


def test_unreadable_and_empty_values(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(PlanError, match=r"x\.json: not readable as JSON"):
        read_counts(tmp_path / "x.json")
    with pytest.raises(PlanError, match=r"absent: not readable"):
        read_counts(tmp_path / "absent")
    for value in ([], [4, -1], [4, None], {"a": 4}):
        with pytest.raises(PlanError, match=r"found the (counts|keys)"):
            read_counts(write(tmp_path / "y.json", {"num_experts_by_block": value}))
