"""The MoE blocks of a stock model in float64, with experts physically removed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from liveprune.pruning.calibration.rows import Batch, Rows
from liveprune.pruning.plan import LayerPlan
from tests import reference


class Blocks:
    """What each block of a model gets and gives, row by row, without padding."""

    @torch.no_grad()
    def __init__(self, model: Path, rows: Rows) -> None:
        # The default implementation of experts has no float64.
        loaded = AutoModelForCausalLM.from_pretrained(model, experts_implementation="eager")
        self.model: Any = loaded.double().eval()
        self.rows = rows
        self.inputs, self.outputs = self.passed()

    @torch.no_grad()
    def passed(self) -> tuple[list[list[Any]], list[list[Any]]]:
        """Inputs and outputs of all blocks: by layer, then by row."""
        layers = self.model.model.layers
        inputs: list[list[Any]] = [[] for _ in layers]
        outputs: list[list[Any]] = [[] for _ in layers]

        def keep(index: int, args: Any, output: Any) -> None:
            inputs[index].append(args[0])
            outputs[index].append(output)

        handles = [
            layer.mlp.register_forward_hook(lambda _m, args, out, i=i: keep(i, args, out))
            for i, layer in enumerate(layers)
        ]
        for row in self.rows.token_ids:
            self.model(torch.from_numpy(row)[None])
        for handle in handles:
            handle.remove()
        return inputs, outputs

    def without(self, index: int, kept: Sequence[int], top_k: int) -> Any:
        """A copy of the block of layer ``index`` with these experts only."""
        block = copy.deepcopy(self.model.model.layers[index].mlp)
        reference._prune_block(block, LayerPlan(index, 8, top_k, tuple(kept)))
        return block

    @torch.no_grad()
    def loss(
        self,
        index: int,
        kept: Sequence[int],
        top_k: int,
        batches: Sequence[Batch],
        inputs: list[Any] | None = None,
    ) -> float:
        """Sum over batches of the norm of the change of the block's outputs.

        ``inputs``, of each row, take the place of the model's own.
        """
        block = self.without(index, kept, top_k)
        given = self.inputs[index] if inputs is None else inputs
        squares = [
            float((block(x) - z).square().sum())
            for x, z in zip(given, self.outputs[index], strict=True)
        ]
        return float(sum(sum(squares[i] for i in batch.indices) ** 0.5 for batch in batches))
