"""Merged expert matrices: linear combinations, computed a chunk of elements at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from liveprune.pruning.checkpoint.safetensors_io import item_bits, read_into
from liveprune.pruning.errors import CheckpointError, PlanError
from liveprune.pruning.plan import Matrix

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 17
"""Per matrix: a few hundred KiB, so that the sources of one chunk stay in the CPU's cache."""
WORKING_BYTES = 1 << 26
"""Bound of what a chunk of all matrices takes; layers of many experts use shorter chunks."""


@dataclass(frozen=True)
class Span:
    """A range of bytes of a weight file: a tensor, or one expert's part of it."""

    name: str
    path: Path
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class Merge:
    """New matrices of one projection: row j = sum over i of coefficients[j, i] * source i."""

    coefficients: Matrix
    """[rows, sources] float32."""
    sources: tuple[Span, ...]
    dtype: str
    """Safetensors name of the sources' and the result's element type."""

    @property
    def size(self) -> int:
        """Bytes of one matrix."""
        return self.sources[0].size

    def chunks(self, files: Mapping[Path, int]) -> Iterator[tuple[int, list[memoryview]]]:
        """Yield (first byte, one chunk of each row): every source is read once, in order.

        Sums in float32, then rounds to the checkpoint's dtype. ``files`` maps weight files to
        open descriptors. A chunk is valid until the next one.

        Raises:
            CheckpointError: a source holds NaN or infinity.
            PlanError: a result is beyond the range of the checkpoint's dtype.
        """
        import torch

        dtype = torch_dtype(self.dtype)
        rows, used = len(self.coefficients), np.flatnonzero(self.coefficients.any(axis=0))
        sources = [self.sources[i] for i in used]
        weights = torch.from_numpy(self.coefficients[:, used])
        item = item_bits(self.dtype) // 8
        fit = WORKING_BYTES // (8 * (rows + len(sources)))
        length = min(CHUNK_ELEMENTS, fit, self.size // item)
        buffer = torch.empty(len(sources), length, dtype=dtype)
        views = [memoryview(row.view(torch.uint8).numpy()) for row in buffer]
        for start in range(0, self.size, length * item):
            count = min(length * item, self.size - start)
            for source, view in zip(sources, views, strict=True):
                read_into(files[source.path], view[:count], source.start + start)
            part = buffer[:, : count // item]
            mixed = weights @ part.float()
            check_range(mixed, self.dtype, zip(sources, part, strict=True))
            result = mixed.to(dtype)
            yield start, [memoryview(row.view(torch.uint8).numpy()) for row in result]


def torch_dtype(name: str) -> torch.dtype:
    """Of an element type that can be added up, by its name in safetensors."""
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]


def check_range(
    mixed: torch.Tensor, dtype: str, sources: Iterable[tuple[Span, torch.Tensor]]
) -> None:
    """Refuse sums that ``dtype`` cannot hold.

    Args:
        mixed: float32, not empty.
        dtype: safetensors name.
        sources: what was added up, at least one; looked at only if something is amiss.

    Raises:
        CheckpointError: a source holds NaN or infinity.
        PlanError: the result is beyond the range.
    """
    import torch

    limit = torch.finfo(torch_dtype(dtype)).max
    # NaN spreads to the minimum and the maximum, and compares as false.
    low, high = (float(x) for x in mixed.aminmax())
    if -limit <= low and high <= limit:
        return
    names = []
    for source, values in sources:
        names.append(source.name)
        if not values.isfinite().all():
            raise CheckpointError(
                f"{source.name}: found NaN or infinity, expected finite weights to merge"
            )
    raise PlanError(
        f"{names[0]} and others: merged values reach {low:g} to {high:g}, expected at most "
        f"{limit:g} in {dtype}"
    )
