from __future__ import annotations

import pytest
import torch

from liveprune.patches import row_merge
from liveprune.patches.row_merge import merge_rows
from liveprune.pruning.errors import PlanError


def test_worked_example() -> None:
    sources = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])]
    targets = [torch.zeros(3), torch.zeros(3)]
    merge_rows(torch.tensor([[1.0, 0.5], [-2.0, 0.0]]), sources, targets)
    assert [x.tolist() for x in targets] == [[6, 12, 18], [-2, -4, -6]]


def test_sums_in_float32_and_rounds_once() -> None:
    """256 + 1 + 1 = 258 in bfloat16; rounded after each sum it would stay 256."""
    sources = [torch.tensor([x]).bfloat16() for x in (256.0, 1.0, 1.0)]
    target = torch.zeros(1, dtype=torch.bfloat16)
    merge_rows(torch.ones(1, 3), sources, [target])
    assert target.tolist() == [258.0]


@pytest.mark.parametrize("chunk", [4 * 6, 100, 1 << 19])
def test_chunks_make_no_difference(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_merge, "CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(0)
    sources = list(torch.randn(4, 1001, generator=generator))
    coefficients = torch.randn(2, 4, generator=generator)
    found = torch.zeros(2, 1001)
    merge_rows(coefficients, sources, list(found))
    right = coefficients.double() @ torch.stack(sources).double()
    torch.testing.assert_close(found.double(), right, rtol=0, atol=1e-6)


def test_no_sources_give_zeros() -> None:
    target = torch.ones(5)
    merge_rows(torch.zeros(1, 0), [], [target])
    assert target.tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(40_000.0, torch.float16), (2e38, torch.bfloat16), (torch.nan, torch.float32)],
)
def test_refuses_what_the_type_cannot_hold(value: float, dtype: torch.dtype) -> None:
    sources = [torch.full((4,), value, dtype=dtype)]
    with pytest.raises(PlanError, match="merged values reach"):
        merge_rows(torch.full((1, 1), 2.0), sources, [torch.zeros(4, dtype=dtype)])
