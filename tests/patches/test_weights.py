from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from liveprune.patches.weights import wrap_get_all_weights
from liveprune.pruning.errors import CheckpointError

GATE = "model.layers.1.mlp.gate"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


class Loader:
    """vLLM's loader as far as it is looked at; ``read`` lists the tensors taken from it."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        self.folder, self.tensors, self.read = folder, tensors, []

    def _prepare_weights(self, model: str, subfolder: Any, revision: Any, **rest: Any) -> Any:
        return str(self.folder), [], True, None

    def weights(self, model_config: Any, model: Any) -> Iterator[Any]:
        for name, tensor in self.tensors.items():
            self.read.append(name)
            yield name, tensor


def model_config(**attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(model="m", revision=None, hf_config=SimpleNamespace(**attributes))


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were verified, in order."""
    found: list[Path] = []
    monkeypatch.setattr("liveprune.patches.weights.verify_checkpoint", found.append)
    return found


def test_other_checkpoints_get_vllms_own_iterator(tmp_path: Path, verified: list[Path]) -> None:
    own = iter([("a", torch.tensor(1.0))])
    wrapped = wrap_get_all_weights(lambda self, config, model: own)
    assert wrapped(Loader(tmp_path, {}), model_config(), None) is own
    assert verified == []


@pytest.mark.parametrize("attribute", ["liveprune", "liveprune_layers"])
def test_pruned_checkpoints_are_verified_once_before_reading(
    attribute: str, tmp_path: Path, verified: list[Path]
) -> None:
    tensors = {EXPERT: torch.ones(2), "lm_head.weight": torch.tensor([torch.nan])}
    loader = Loader(tmp_path, tensors)
    weights = wrap_get_all_weights(Loader.weights)(loader, model_config(**{attribute: {}}), None)
    assert (verified, loader.read) == ([tmp_path], [])
    assert [name for name, _ in weights] == list(tensors)
    assert verified == [tmp_path]


def test_a_refusal_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise CheckpointError(f"{folder}: damaged")

    monkeypatch.setattr("liveprune.patches.weights.verify_checkpoint", refuse)
    loader = Loader(tmp_path, {EXPERT: torch.ones(2)})
    with pytest.raises(CheckpointError, match="damaged"):
        wrap_get_all_weights(Loader.weights)(loader, model_config(liveprune={}), None)
    assert loader.read == []


@pytest.mark.parametrize(
    "name",
    [
        EXPERT,
        "model.layers.1.block_sparse_moe.experts.down_proj",
        f"{GATE}.weight",
        f"{GATE}.e_score_correction_bias",
        "model.layers.1.mlp.router_map",
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tensors_of_experts_and_routers_must_be_finite(
    name: str, value: float, tmp_path: Path, verified: Callable[..., Any]
) -> None:
    tensor = torch.ones(3, 4)
    tensor[1, 2] = value
    loader = Loader(tmp_path, {name: tensor})
    weights = wrap_get_all_weights(Loader.weights)(loader, model_config(liveprune={}), None)
    with pytest.raises(CheckpointError, match=r"found NaN or infinity in 1 of 12") as caught:
        list(weights)
    assert str(caught.value).startswith(f"{name}: ")
