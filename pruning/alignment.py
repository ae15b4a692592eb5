"""Neuron alignment: which neuron of one expert stands where which neuron of another stands.

The order of an expert's neurons has no meaning: gate, up and down can be permuted together and the
expert stays the same. So before two experts are averaged, the neurons of one are put in the order
that fits the other's best, one to one. A neuron is a row of gate, one of up and a column of down.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Expert = tuple[Tensor, Tensor]
"""Gate and up as one [2 ffn, hidden]; down [hidden, ffn]."""
Table = npt.NDArray[np.float64]
"""[ffn, ffn]: of each neuron of one expert (rows) and each of another (columns)."""
Order = npt.NDArray[np.int32]
"""[ffn]: where each neuron of one expert goes among another's; a permutation."""

BLOCK = 1024
"""Neurons of each of two experts that are compared at once."""


def aligned(one: Expert, other: Expert) -> Order:
    """The order that brings the weights of ``one`` closest to those of ``other``.

    Weight matching: of all permutations, that with the smallest sum of squared distances between
    neurons, hence the largest sum of dot products. Memory: 8 * ffn^2 bytes (Mixtral-8x7B 1.6 GB,
    Qwen3-30B-A3B 5 MB) and some MB; time: ffn^2 * hidden, and the assignment.
    """
    table = products(one, other)
    np.negative(table, out=table)
    return assigned(table)


def assigned(costs: Table) -> Order:
    """The permutation of the smallest sum of costs (Hungarian method)."""
    order: Order = linear_sum_assignment(costs)[1].astype(np.int32)
    return order


def products(one: Expert, other: Expert) -> Table:
    """Dot products of neurons, in float32, block by block."""
    ffn = one[1].shape[1], other[1].shape[1]
    table = np.empty(ffn)
    for rows in blocks(ffn[0]):
        left = neurons(one, rows)
        for columns in blocks(ffn[1]):
            table[rows, columns] = (left @ neurons(other, columns).T).cpu().numpy()
    return table


def lengths(expert: Expert) -> npt.NDArray[np.float64]:
    """[ffn]: the Euclidean norm of each neuron."""
    count = expert[1].shape[1]
    norms = [torch.linalg.vector_norm(neurons(expert, x), dim=1) for x in blocks(count)]
    return torch.cat(norms).double().cpu().numpy()


def neurons(expert: Expert, part: slice = slice(None)) -> Tensor:
    """[n, 3 hidden] float32: gate row, up row and down column of each neuron."""
    gate, up = expert[0].chunk(2)
    return torch.cat([gate[part], up[part], expert[1].T[part]], dim=1).float()


def blocks(count: int) -> Iterator[slice]:
    """``count`` neurons, ``BLOCK`` at a time."""
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))
