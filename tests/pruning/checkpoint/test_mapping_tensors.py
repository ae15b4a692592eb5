"""Damaged mappings are refused by name, when the headers are read or when all is verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.checkpoint.inspect import inspect
from liveprune.pruning.checkpoint.verify import verify_checkpoint
from liveprune.pruning.errors import CheckpointError
from tests.checkpoints import edited
from tests.forms import form_plan

TinyModel = Callable[..., Path]
Held = dict[str, torch.Tensor]
BLOCK = "model.layers.1.mlp."
MAP, VECTORS, ROUTER_MAP = (f"{BLOCK}{x}" for x in ("expert_map", "constants", "router_map"))


@pytest.fixture(scope="module")
def folders(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Old experts 0, 3, 4, 6 of 8 kept, or any mapped onto four."""
    base = tiny_model("olmoe")
    made = {}
    for form in ("constants", "neurons+map"):
        made[form] = tmp_path_factory.mktemp("mapped") / "out"
        apply_plan(base, form_plan(base, form), made[form])
    return made


@pytest.mark.parametrize(
    ("form", "name", "change", "match"),
    [
        (
            "constants",
            MAP,
            None,
            r"not found; layer 1 has 8 gate rows for 4 .*, expected I32 \[8\]",
        ),
        ("constants", VECTORS, None, r"not found; .* expected F32 \[4, 64\]"),
        ("neurons+map", MAP, None, r"not found; .* expected I32 \[8\]"),
        ("neurons+map", VECTORS, torch.ones(4, 64), "expected none, the config states an expert"),
        ("constants", ROUTER_MAP, torch.ones(4, 8), "expected none, .* states constant experts"),
        ("constants", VECTORS, torch.ones(3, 64), r"found F32 \[3, 64\], expected F32 \[4, 64\]"),
        ("constants", VECTORS, torch.ones(4, 64).bfloat16(), r"found BF16 \[4, 64\], expected F32"),
        ("constants", MAP, torch.zeros(8, dtype=torch.int64), r"found I64 \[8\], expected I32"),
        ("neurons+map", MAP, [0, 1, 2, 3, 4, 0, 0, 0], "found .*, expected each of 0 to 3$"),
        ("neurons+map", MAP, [0, 1, 2, 3, -1, 0, 0, 0], "expected each of 0 to 3$"),
        ("neurons+map", MAP, [0, 1, 2, 2, 2, 0, 0, 0], "expected each of 0 to 3$"),
        ("constants", MAP, [0, -1, -1, 1, 2, -1, 4, -1], "each of 0 to 3 once, ascending, and -1"),
        ("constants", MAP, [0, -1, -1, 1, 2, -1, 2, 3], "each of 0 to 3 once, ascending, and -1"),
        ("constants", MAP, [0, -1, -1, 2, 1, -1, 3, -1], "each of 0 to 3 once, ascending, and -1"),
        ("constants", MAP, [0, -1, -1, 1, 2, -2, 3, -1], "each of 0 to 3 once, ascending, and -1"),
    ],
)
def test_headers_and_ids(
    form: str,
    name: str,
    change: torch.Tensor | list[int] | None,
    match: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    def edit(held: Held) -> None:
        held.pop(name, None)
        if isinstance(change, list):
            held[name] = torch.tensor(change, dtype=torch.int32)
        elif change is not None:
            held[name] = change

    folder = edited(folders[form], tmp_path / "m", edit)
    for look in (inspect, verify_checkpoint):
        with pytest.raises(CheckpointError, match=f"{name}: .*{match}"):
            look(folder)


def test_values(folders: dict[str, Path], tmp_path: Path) -> None:
    """NaN by name; other values and other maps by the fingerprint."""

    def poison(held: Held) -> None:
        held[VECTORS][2, 5] = float("nan")

    def change(held: Held) -> None:
        held[VECTORS][2, 5] += 1

    def exchange(held: Held) -> None:
        held[MAP] = held[MAP].flip(0)

    with pytest.raises(CheckpointError, match=f"{VECTORS}: found NaN or infinity in 1 of 256 ele"):
        verify_checkpoint(edited(folders["constants"], tmp_path / "a", poison))
    for number, (form, edit) in enumerate((("constants", change), ("neurons+map", exchange))):
        folder = edited(folders[form], tmp_path / str(number), edit)
        with pytest.raises(CheckpointError, match="layer 1: router or experts have fingerprint"):
            verify_checkpoint(folder)


def test_a_config_that_states_another_mapping(folders: dict[str, Path], tmp_path: Path) -> None:
    block = json.loads((folders["constants"] / "config.json").read_text())["liveprune"]
    block["router_mapping"]["1"] = "expert_map"
    folder = edited(folders["constants"], tmp_path / "m", liveprune=block)
    with pytest.raises(CheckpointError, match="layer 1 has the mapping expert_map, expected const"):
        verify_checkpoint(folder)
    with pytest.raises(CheckpointError, match=f"{VECTORS}: found; expected none, .* an expert map"):
        inspect(folder)
