from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.methods.ream_groups import distances, owners, raised


def test_zeros_are_raised() -> None:
    assert raised(np.array([0.0, 2.0, 0.7, -np.inf])).tolist() == [0.5, 2, 0.7, 0.5]
    assert raised(np.array([0.0, 2.0, 0.2])).tolist() == [0.2, 2, 0.2]
    assert raised(np.array([-np.inf, 0.0])).tolist() == [0.5, 0.5]


def test_distances_by_hand() -> None:
    """Outputs at right angles, or the same way; logits opposite, or the same way."""
    gated = np.array([[2.0, 0], [0, 3], [5, 0], [0, 0]])
    logits = np.array([[1.0, 0], [-2, 0], [4, 0], [0, 1]])
    found = distances(gated, logits @ logits.T)
    assert np.allclose(np.diag(found)[:3], 0)
    # cos 0 and a distance of 2: 1 - (1/2 + 0) / 2. The last one's output has no direction: cos 0.
    np.testing.assert_allclose(found[0, 1:], [0.75, 0, 1 - (0.5 + 1 - math.sqrt(2) / 2) / 2])
    np.testing.assert_allclose(found, found.T)


# Centroids 1 (most salient) and 4; on a line at 0 and 10.
PLACES = np.array([2.0, 0, 1, 9, 10, 3])
DISTANCE = np.abs(PLACES[:, None] - PLACES[None, :])
SALIENCY = np.array([0.1, 9, 0.2, 0.3, 5, 0.1])


def test_the_most_salient_takes_in_first() -> None:
    assert owners(DISTANCE, SALIENCY, [1, 4], 4).tolist() == [1, 1, 1, 4, 4, 1]
    assert owners(DISTANCE, SALIENCY, [1, 4], 3).tolist() == [1, 1, 1, 4, 4, 4]
    # The group of 1 has room for one, that of 4 too; what is left over goes to the nearest.
    assert owners(DISTANCE, SALIENCY, [1, 4], 2).tolist() == [1, 1, 1, 4, 4, 1]
    # All fit in the first.
    assert owners(DISTANCE, SALIENCY, [1, 4], 16).tolist() == [1, 1, 1, 1, 4, 1]
    assert owners(DISTANCE, SALIENCY, [1, 4], 0).tolist() == [1, 1, 1, 4, 4, 1]


def test_128_to_96_with_16_touches_three() -> None:
    """The example of methods.md 6.4: 15 + 15 + 2 experts."""
    rng = np.random.default_rng(0)
    distance = rng.uniform(size=(128, 128))
    saliency = rng.uniform(size=128)
    centroids = np.sort(np.argsort(-saliency)[:96]).tolist()
    found = owners(distance + distance.T, saliency, centroids, 16)
    sizes = np.bincount(found, minlength=128)
    order = np.argsort(-saliency)
    assert sizes[order[:4]].tolist() == [16, 16, 3, 1]
    assert sizes.sum() == 128
    assert (np.delete(sizes, order[:3]) <= 1).all()


@given(st.integers(2, 12), st.data(), st.integers(0, 2**31))
def test_every_expert_joins_one(experts: int, data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    keep = data.draw(st.integers(1, experts))
    size = data.draw(st.sampled_from([0, 2, 3, 16]))
    distance = rng.uniform(size=(experts, experts))
    centroids = sorted(rng.permutation(experts)[:keep].tolist())
    found = owners(distance + distance.T, rng.uniform(size=experts), centroids, size)
    assert set(found.tolist()) == set(centroids)
    assert (found[centroids] == centroids).all()
    if size and keep * (size - 1) >= experts - keep:
        assert np.bincount(found).max() <= size
