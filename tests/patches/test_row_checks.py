from __future__ import annotations

import zlib
from types import SimpleNamespace

import torch

from liveprune.patches.row_checks import RowChecks


def test_measures_the_bytes_of_one_row() -> None:
    """bfloat16 1.0 is 0x3f80, stored low byte first; -2.0 is 0xc000."""
    rows = SimpleNamespace(
        w13=torch.tensor([[[9.0, 9.0]], [[1.0, -2.0]]]).bfloat16(),
        w2=torch.tensor([[[9.0]], [[1.0]]]).bfloat16(),
    )
    expected = zlib.crc32(b"\x80\x3f\x00\xc0" + b"\x80\x3f")
    assert RowChecks.measure(rows, 1) == expected
    assert RowChecks.measure(rows, 0) != expected


def test_remembers_until_told_to_forget() -> None:
    checks = RowChecks()
    assert checks.expected(0, 3) is None
    for layer, row, checksum in ((0, 3, 11), (0, 4, 12), (1, 3, 13), (0, 4, 14)):
        checks.record(layer, row, checksum)
    checks.forget(0, [3, 9])
    found = [checks.expected(*key) for key in ((0, 3), (0, 4), (1, 3))]
    assert found == [None, 14, 13]
