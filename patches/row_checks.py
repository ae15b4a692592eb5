"""Checksums of expert rows: what was written is what is read, and files have not changed."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from liveprune.patches.row_filler import Rows


class RowChecks:
    """The checksum of each row as it was last written, by (layer, row).

    Those of base experts stay when their rows are released: filling them again must give the same.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], int] = {}

    def record(self, layer: int, row: int, checksum: int) -> None:
        self._found[layer, row] = checksum

    def forget(self, layer: int, rows: Iterable[int]) -> None:
        """Drop what rows held that will hold something else: spare ones, when released."""
        for row in rows:
            self._found.pop((layer, row), None)

    def expected(self, layer: int, row: int) -> int | None:
        """None: the row was never written."""
        return self._found.get((layer, row))

    @staticmethod
    def measure(rows: Rows, row: int) -> int:
        """CRC-32 of what row ``row`` holds now: the bytes of its ``w13``, then of its ``w2``."""
        checksum = 0
        for tensor in (rows.w13, rows.w2):
            flat = tensor[row].reshape(-1).view(torch.uint8)
            checksum = zlib.crc32(flat.cpu().numpy().data, checksum)
        return checksum
