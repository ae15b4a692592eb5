"""REAM's alignment: neurons fit that fire on the same tokens and are made of the same weights.

arXiv:2604.04356 (methods.md 6.4). The cost of putting a neuron in another's place is the distance
of what they put out on sampled tokens plus the distance of their weights, reduced by PCA. Not
stated in what was read [U], and chosen here: vectors are normalised to unit length, neuron by
neuron; the principal components are those of the centroid's neurons, so that one decomposition
serves its whole group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from liveprune.pruning.alignment import Expert, Order, assigned, blocks, neurons
from liveprune.pruning.calibration.rows import Batch, Rows

COMPONENTS = 64
"""Principal components of the weights."""
TOKENS = 1024
"""Sampled tokens whose activations are in memory at once."""


@dataclass(frozen=True)
class Sampled:
    """Tokens of one batch that are in the sample."""

    tokens: Tensor
    """[n] int64 among the rows * length of the batch."""
    places: Tensor
    """[n] int64 in the sample."""


def sample(rows: Rows, batches: Sequence[Batch], count: int) -> list[Sampled]:
    """Up to ``count`` tokens, evenly spaced over all in the order of the rows; by batch.

    Which tokens these are does not depend on how rows are batched.
    """
    count = min(count, rows.tokens)
    picked = np.arange(count) * rows.tokens // count
    starts = np.cumsum([0, *map(len, rows.token_ids)])
    found = []
    for batch in batches:
        length = batch.input_ids.shape[1]
        tokens, places = [], []
        for row, index in enumerate(batch.indices):
            first, last = np.searchsorted(picked, starts[index : index + 2])
            tokens.append(row * length + picked[first:last] - starts[index])
            places.append(np.arange(first, last))
        found.append(
            Sampled(
                torch.from_numpy(np.concatenate(tokens)), torch.from_numpy(np.concatenate(places))
            )
        )
    return found


class Centroid:
    """An expert that others are aligned to."""

    def __init__(
        self, expert: Expert, inputs: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> None:
        """Decompose its neurons: [ffn, 3 hidden] float32, by NumPy's SVD.

        Args:
            expert: its weights.
            inputs: [n, hidden], sampled tokens as they reach the experts.
            activation: between gate and up.
        """
        self._expert = expert
        self._inputs = inputs
        self._activation = activation
        rows = nn.functional.normalize(neurons(expert)).cpu().numpy()
        basis = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][:COMPONENTS]
        self._basis = torch.from_numpy(basis).to(expert[1].device)

    def order(self, member: Expert) -> Order:
        """Where each neuron of ``member`` goes.

        Memory: 20 * ffn^2 bytes (Qwen3-30B-A3B 12 MB, Mixtral-8x7B 4 GB), and the activations of
        ``TOKENS`` tokens.
        """
        costs = self._activation_distances(member)
        for part in blocks(costs.shape[0]):
            costs[part] += self._weight_distances(member, part)
        return assigned(costs)

    def _activation_distances(self, member: Expert) -> npt.NDArray[np.float64]:
        """[ffn, ffn], from dot products summed in float64 over float32 ones of ``TOKENS`` each."""
        ffn = member[1].shape[1]
        total = torch.zeros(ffn, ffn, dtype=torch.float64, device=self._inputs.device)
        squares = torch.zeros(2, ffn, dtype=torch.float64, device=self._inputs.device)
        for start in range(0, len(self._inputs), TOKENS):
            x = self._inputs[start : start + TOKENS]
            theirs, ours = (self._fired(expert, x) for expert in (member, self._expert))
            total += theirs.T @ ours
            squares += torch.stack([theirs.square().sum(0), ours.square().sum(0)])
        # A neuron that never fires is at right angles to all.
        norms = squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        total /= norms[0][:, None]
        total /= norms[1]
        return total.mul_(-2).add_(2).clamp_min_(0).sqrt_().cpu().numpy()

    def _fired(self, expert: Expert, x: Tensor) -> Tensor:
        """[tokens, ffn] float32: what each neuron gives to down."""
        gate, up = nn.functional.linear(x, expert[0]).chunk(2, dim=-1)
        return (self._activation(gate) * up).float()

    def _weight_distances(self, member: Expert, part: slice) -> npt.NDArray[np.float64]:
        """[n, ffn]: of some neurons of the member and all of the centroid, among the components."""
        theirs, ours = (
            nn.functional.normalize(neurons(expert, x)) @ self._basis.T
            for expert, x in ((member, part), (self._expert, slice(None)))
        )
        found = torch.cdist(theirs, ours, compute_mode="donot_use_mm_for_euclid_dist")
        return found.double().cpu().numpy()
