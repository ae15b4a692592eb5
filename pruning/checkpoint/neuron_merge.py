"""Experts merged neuron by neuron: rows or columns of their matrices, gathered into sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from liveprune.pruning.checkpoint.merge import Span, check_range, torch_dtype
from liveprune.pruning.checkpoint.safetensors_io import item_bits, read_into
from liveprune.pruning.neuron_sources import Source, neuron_sources
from liveprune.pruning.plan import LayerPlan

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 21
"""Of a matrix that is read or written at a time: 8 MiB as float32, long enough that adding up
thousands of short rows is not all overhead."""


@dataclass(frozen=True, eq=False)
class NeuronMerge:
    """One matrix of one new expert, by the layer's neuron map."""

    layer: LayerPlan
    new: int
    """Which new expert."""
    sources: tuple[Span, ...]
    """The same matrix of every old expert."""
    rows: int
    by_column: bool
    """A neuron is a column (down), not a row (gate, up)."""
    dtype: str
    """Safetensors name of the sources' and the result's element type."""

    @property
    def size(self) -> int:
        """Bytes of the matrix."""
        return self.sources[0].size

    @property
    def columns(self) -> int:
        return self.size * 8 // item_bits(self.dtype) // self.rows

    def chunks(self, files: Mapping[Path, int]) -> Iterator[tuple[int, list[memoryview]]]:
        """Yield (first byte, [one chunk]), as ``Merge.chunks`` does for its only row.

        Every source is read once, in order. Sums in float32, then rounds to the checkpoint's
        dtype. Holds the float32 sums of one matrix at most, those of a chunk for a down matrix,
        and a few chunks.

        Raises:
            CheckpointError: a source holds NaN or infinity.
            PlanError: a result is beyond the range of the checkpoint's dtype.
        """
        import torch

        used = neuron_sources(self.layer, self.new)
        step = max(1, CHUNK_ELEMENTS // self.columns)
        starts = [(first, min(step, self.rows - first)) for first in range(0, self.rows, step)]
        if self.by_column:
            for first, count in starts:
                total = torch.zeros(self.columns, count)
                for source in used:
                    part = self._read(files, source.expert, first, count)
                    _add(total, part.t(), source, first=0)
                yield self._rounded(total.t(), first, used, files)
            return
        total = torch.zeros(self.rows, self.columns)
        for source in used:
            for first, count in starts:
                _add(total, self._read(files, source.expert, first, count), source, first)
        for first, count in starts:
            yield self._rounded(total[first : first + count], first, used, files)

    def _read(self, files: Mapping[Path, int], expert: int, first: int, count: int) -> torch.Tensor:
        """Rows of an old expert's matrix."""
        import torch

        part = torch.empty(count, self.columns, dtype=torch_dtype(self.dtype))
        span = self.sources[expert]
        view = part.view(-1).view(torch.uint8).numpy().data
        read_into(files[span.path], view, span.start + first * (self.size // self.rows))
        return part

    def _rounded(
        self, total: torch.Tensor, first: int, used: list[Source], files: Mapping[Path, int]
    ) -> tuple[int, list[memoryview]]:
        import torch

        # Read again only if something is amiss.
        parts = ((self.sources[x.expert], self._read(files, x.expert, 0, self.rows)) for x in used)
        check_range(total, self.dtype, parts)
        result = total.to(torch_dtype(self.dtype)).contiguous()
        data = result.view(-1).view(torch.uint8).numpy().data
        return first * (self.size // self.rows), [data]


def _add(total: torch.Tensor, part: torch.Tensor, source: Source, first: int) -> None:
    """Add a source's neurons ``first`` onwards, one a row of ``part``, to their targets."""
    import torch

    # Neurons ascend, so that those of the part are neighbours.
    low, high = source.neurons.searchsorted([first, first + len(part)])
    if low == high:
        return
    picked = part[torch.from_numpy(source.neurons[low:high] - first)].float()
    picked *= torch.from_numpy(source.weights[low:high])[:, None]
    total.index_add_(0, torch.from_numpy(source.targets[low:high]), picked)
