"""Hand-made layers for methods that fold pruned experts in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from liveprune.pruning.alignment import Expert
from liveprune.pruning.budget import LayerBudget
from liveprune.pruning.calibration.statistics import LayerStatistics
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.methods import METHODS
from liveprune.pruning.methods.method import Folding
from liveprune.pruning.model_spec import MoELayer, Router


class HandMade:
    """Stands in for ``LayerWeights``."""

    def __init__(self, experts: Sequence[Expert]) -> None:
        self._experts = experts

    def expert(self, index: int) -> Expert:
        return self._experts[index]


def expert(neurons: Sequence[Sequence[float]]) -> Expert:
    """Of neurons, each gate row, up row and down column in one."""
    rows = torch.tensor(neurons).float()
    gate, up, down = rows.chunk(3, dim=1)
    return torch.cat([gate, up]), down.T.contiguous()


def fold(
    name: str,
    counts: Sequence[float],
    kept: Sequence[int],
    experts: Sequence[Expert] = (),
    *,
    groups: int = 1,
    protected: Sequence[int] = (),
    keep_gate_rows: bool = False,
    options: dict[str, Any] | None = None,
    **sums: Any,
) -> LayerPlan:
    """The layer 4 that a method makes; ``sums`` are fields of ``LayerStatistics``."""
    method = METHODS[name]
    size = len(counts)
    all_sums = np.zeros((size, 3, 3))
    all_sums[:, 0, 0] = counts
    scores = np.array(counts, np.float64)
    scores[list(protected)] = np.inf
    arrays = {key: np.array(value, np.float64) for key, value in sums.items()}
    assert method.fold is not None
    return method.fold(
        Folding(
            budget=LayerBudget(MoELayer(4, size, 1, size), len(kept), 1, 1, skipped=False),
            kept=tuple(kept),
            scores=scores,
            statistics=LayerStatistics(all_sums, np.ones(size), np.ones(size), **arrays),
            weights=HandMade(experts),  # type: ignore[arg-type]
            router=Router("softmax", renormalise=True, groups=groups),
            keep_gate_rows=keep_gate_rows,
            options=method.with_options(options or {}),
        )
    )


def with_copies(model: Path, folder: Path, *, permute: bool) -> Path:
    """The model with every expert of a layer a copy of its first, neurons in another order."""
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in [x for x in tensors if ".experts.0." in x and ("w1." in x or "gate_proj" in x)]:
        up, down = name.replace("w1.", "w3."), name.replace("w1.", "w2.")
        up, down = up.replace("gate_proj", "up_proj"), down.replace("gate_proj", "down_proj")
        for i in range(1, 8):
            order = torch.arange(len(tensors[name]))
            if permute:
                order = torch.randperm(len(order), generator=generator)
            for part in (name, up):
                copy = part.replace(".experts.0.", f".experts.{i}.")
                tensors[copy] = tensors[part][order].contiguous()
            copy = down.replace(".experts.0.", f".experts.{i}.")
            tensors[copy] = tensors[down][:, order].contiguous()
    folder.mkdir()
    for file in model.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


MakeModel = Callable[..., Path]
