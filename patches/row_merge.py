"""Merged rows: linear combinations of packed rows, computed a chunk of elements at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from liveprune.pruning.errors import PlanError

CHUNK_BYTES = 1 << 22
"""What one chunk of all matrices takes in float32: fits the CPU's cache, and is long enough for
the calls that handle it to cost little."""
DEVICE_CHUNK_BYTES = 1 << 26
"""The same where a call is a launch, and the cache no concern."""


def merge_rows(
    coefficients: torch.Tensor, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> None:
    """Set ``targets[j]`` to the sum over i of ``coefficients[j, i] * sources[i]``.

    Sums in float32 and rounds once, to the targets' dtype. Every source is read once.

    Args:
        coefficients: [targets, sources] float32.
        sources: flat tensors of one length and dtype.
        targets: flat tensors like them.

    Raises:
        PlanError: a sum is not finite or beyond the range of the targets' dtype.
    """
    device, dtype, size = targets[0].device, targets[0].dtype, targets[0].numel()
    chunk_bytes = CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES
    length = min(size, max(1, chunk_bytes // (4 * (len(sources) + len(targets)))))
    weights = coefficients.to(device)
    wide = torch.empty(len(sources), length, dtype=torch.float32, device=device)
    for start in range(0, size, length):
        part = slice(start, min(start + length, size))
        chunk = wide[:, : part.stop - start]
        for line, source in zip(chunk, sources, strict=True):
            line.copy_(source[part])
        mixed = weights @ chunk
        check_range(mixed, dtype)
        for target, line in zip(targets, mixed, strict=True):
            target[part].copy_(line)


def check_range(mixed: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse sums that are not finite in ``dtype``.

    Raises:
        PlanError: naming the range found and the limit.
    """
    # NaN spreads to the minimum and the maximum, and compares as false.
    low, high = (float(x) for x in mixed.aminmax())
    limit = torch.finfo(dtype).max
    if not (-limit <= low and high <= limit):
        raise PlanError(
            f"merged values reach {low:g} to {high:g}, expected at most {limit:g} in {dtype}"
        )
