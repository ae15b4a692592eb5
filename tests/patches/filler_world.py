"""A row filler over fake rows, and what vLLM would have made of a checkpoint's experts."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from vllm._custom_ops import cpu_prepack_moe_weight

from liveprune.patches.expert_packing import Packing
from liveprune.patches.expert_reader import ExpertReader
from liveprune.patches.row_filler import RowFiller
from liveprune.pruning.model_spec import ModelSpec
from tests.checkpoints import tensors

EXPERTS, SPARE = 8, 4
POISON = -77.0
TIMEOUT = 60


class FakeRows:
    """Rows without memory are poisoned, so that touching one shows."""

    def __init__(self, packing: Packing, dtype: torch.dtype) -> None:
        shape13, shape2 = packing.row_shapes()
        self.w13 = torch.full((EXPERTS + SPARE, *shape13), POISON, dtype=dtype)
        self.w2 = torch.full((EXPERTS + SPARE, *shape2), POISON, dtype=dtype)
        self.resident: frozenset[int] = frozenset()
        self.most = 0
        """Most rows that were resident at once."""

    def commit(self, rows: Collection[int]) -> None:
        assert not self.resident & set(rows), "rows with memory are never given it again"
        self.resident |= frozenset(rows)
        self.most = max(self.most, len(self.resident))

    def release(self, rows: Collection[int]) -> int:
        self.resident -= frozenset(rows)
        for tensor in (self.w13, self.w2):
            tensor[sorted(rows)] = POISON
        return len(rows)

    @property
    def written(self) -> set[int]:
        """Rows that hold something."""
        pairs = enumerate(zip(self.w13, self.w2, strict=True))
        return {i for i, pair in pairs if any(bool((x != POISON).any()) for x in pair)}


class Setup:
    """A filler over fake rows, and what its rows must hold."""

    def __init__(
        self,
        model: Path,
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        ranks: int = 1,
        reader: type[ExpertReader] = ExpertReader,
        packing: Packing | None = None,
        **arguments: Any,
    ) -> None:
        spec = ModelSpec.from_path(model)
        self.reader = reader(model, spec, dtype=dtype, tp_rank=rank, tp_size=ranks)
        size = spec.expert_size // ranks
        padded = -(-size // 32) * 32
        self.packing = packing or Packing(spec.hidden_size, size, padded, isa="vec")
        self.layers = [layer.index for layer in spec.layers]
        self.rows = {layer: FakeRows(self.packing, dtype) for layer in self.layers}
        packings = dict.fromkeys(self.layers, self.packing)
        self.filler = RowFiller(self.reader, packings, self.rows, **arguments)

    def run(self, *arguments: Any) -> str:
        """Start a task, wait, and return its phase; the error of a failed one."""
        found = self.filler.start(*arguments).wait(TIMEOUT)
        return found.error or found.phase

    def resident(self) -> list[set[int]]:
        return [set(self.rows[layer].resident) for layer in self.layers]

    def written(self) -> list[set[int]]:
        return [self.rows[layer].written for layer in self.layers]


def packed(model: Path, layer: int, dtype: torch.dtype, rank: int = 0, ranks: int = 1) -> Any:
    """(w13, w2) of a whole layer: load, slice, stack, pad, pack, as vLLM does."""
    spec = ModelSpec.from_path(model)
    held, prefix = tensors(model), f"{spec.architecture.block_prefix(layer)}experts."
    gate, up, down = (
        torch.stack([held[f"{prefix}{e}.{name}.weight"] for e in range(EXPERTS)])
        for name in spec.architecture.experts
    )
    size = spec.expert_size // ranks
    padding = -size % 32
    halves = [
        torch.nn.functional.pad(x.chunk(ranks, dim=1)[rank], (0, 0, 0, padding)) for x in (gate, up)
    ]
    w13 = torch.cat(halves, dim=1).to(dtype).contiguous()
    w2 = torch.nn.functional.pad(down.chunk(ranks, dim=2)[rank], (0, padding)).to(dtype)
    return cpu_prepack_moe_weight(w13, "vec"), cpu_prepack_moe_weight(w2.contiguous(), "vec")
