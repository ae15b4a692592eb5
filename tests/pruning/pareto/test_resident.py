"""Resident bytes against the checkpoints that ``apply_plan`` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.pareto.resident import ModelBytes
from liveprune.pruning.plan import Plan
from tests.checkpoints import make_plan, merge_plan
from tests.models import FAMILIES


def sizes_of(model: Path) -> ModelBytes:
    return ModelBytes(model, ModelSpec.from_path(model))


def written(model: Path, plan: Plan, folder: Path) -> int:
    apply_plan(model, plan, folder)
    return read_checkpoint(folder).size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_has_the_bytes_of_its_checkpoint(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(family)
    # Of every group of the last family, two experts.
    plan = make_plan(model, [[0, 2, 4, 6]], top_k=2)
    found = sizes_of(model).of(plan)
    assert found.total == written(model, plan, tmp_path / "out")
    full = sizes_of(model).of(None)
    assert full.total == read_checkpoint(model).size
    assert (2 * found.experts, 2 * found.gates, found.rest) == (
        full.experts,
        full.gates,
        full.rest,
    )


@pytest.mark.parametrize("router_map", [True, False])
def test_a_merged_model_has_the_bytes_of_its_checkpoint(
    router_map: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    kept = None if router_map else [0, 3, 5]
    plan = merge_plan(model, 3, kept=kept, router_map=router_map)
    found = sizes_of(model).of(plan)
    assert found.total == written(model, plan, tmp_path / "out")
    # A float32 map [3, 8] in each of 3 layers.
    assert found.maps == (3 * 4 * 3 * 8 if router_map else 0)


def test_constants_count(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("mixtral")
    pruned = make_plan(model, [[0, 1, 2, 3]])
    constants = np.zeros((4, 64), np.float32)
    layers = tuple(dataclasses.replace(x, constants=constants) for x in pruned.layers)
    found = sizes_of(model).of(dataclasses.replace(pruned, layers=layers))
    full = sizes_of(model).of(None)
    assert found.gates == full.gates  # the gate keeps all rows
    assert found.maps == 3 * 4 * 64 * 4
    assert found.experts == full.experts // 2


def test_expert_maps_count(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("mixtral")
    merged = merge_plan(model, 4, kept=[0, 1, 2, 3])
    layers = tuple(
        dataclasses.replace(x, kept=(), expert_map=(0, 1, 2, 3, 0, 1, 2, 3)) for x in merged.layers
    )
    found = sizes_of(model).of(dataclasses.replace(merged, layers=layers))
    full = sizes_of(model).of(None)
    assert (found.gates, found.maps) == (full.gates, 3 * 8 * 8)
    assert found.experts == full.experts // 2
