"""Aligning an expert whose neurons were permuted gives back the order that they had."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning import alignment
from liveprune.pruning.alignment import Expert, aligned, assigned, lengths, neurons, products


def some_expert(ffn: int, hidden: int, seed: int) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(2 * ffn, hidden, generator=generator)
    return gate_up, torch.randn(hidden, ffn, generator=generator)


def permuted(expert: Expert, order: torch.Tensor) -> Expert:
    """Neuron n is neuron ``order[n]`` of ``expert``."""
    gate, up = expert[0].chunk(2)
    return torch.cat([gate[order], up[order]]), expert[1][:, order]


@given(st.integers(1, 24), st.integers(1, 9), st.integers(0, 2**31))
def test_a_permutation_is_undone(ffn: int, hidden: int, seed: int) -> None:
    expert = some_expert(ffn, hidden, seed)
    order = torch.randperm(ffn, generator=torch.Generator().manual_seed(seed + 1))
    found = aligned(permuted(expert, order), expert)
    assert found.tolist() == order.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_also_under_noise_and_block_by_block(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(alignment, "BLOCK", 7)
    expert = some_expert(40, 24, 0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    noise = some_expert(40, 24, 2)
    gate_up, down = permuted(expert, order)
    noisy = (gate_up + 0.1 * noise[0]).to(dtype), (down + 0.1 * noise[1]).to(dtype)
    assert aligned(noisy, (expert[0].to(dtype), expert[1].to(dtype))).tolist() == order.tolist()


def test_products_and_lengths_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "BLOCK", 3)
    one, other = some_expert(8, 5, 0), some_expert(8, 5, 1)
    left, right = (
        np.array([[*g, *u, *d] for g, u, d in zip(x[:8], x[8:], y.T, strict=True)], np.float64)
        for x, y in ((a.numpy(), b.numpy()) for a, b in (one, other))
    )
    np.testing.assert_allclose(products(one, other), left @ right.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lengths(one), np.linalg.norm(left, axis=1), rtol=1e-6)
    assert np.array_equal(neurons(one).numpy(), left.astype(np.float32))


def test_the_sum_of_squared_distances_is_smallest() -> None:
    """Against all 720 permutations of six neurons that have nothing to do with each other."""
    one, other = some_expert(6, 4, 3), some_expert(6, 4, 4)
    left, right = neurons(one).double(), neurons(other).double()
    sums = {
        order: float((left - right[list(order)]).square().sum())
        for order in itertools.permutations(range(6))
    }
    assert tuple(aligned(one, other).tolist()) == min(sums, key=sums.__getitem__)


def test_by_hand() -> None:
    """Both want column 0; giving it to row 1 costs 1 + 2 in all, to row 0 it would be 0 + 5."""
    assert assigned(np.array([[0.0, 2.0], [1.0, 5.0]])).tolist() == [1, 0]
