"""REAM's groups: which experts are alike, and which the most salient ones take in.

arXiv:2604.04356 (methods.md 6.4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from liveprune.pruning.methods.expert_groups import Owners, cosines

Values = npt.NDArray[np.float64]


def raised(saliency: Values) -> Values:
    """Saliencies as weights: none is zero, so that no group weighs nothing.

    What is zero, or undefined (-inf, no token came), becomes the smallest positive one, a half at
    most.
    """
    positive = saliency[saliency > 0]
    least = min(0.5, float(positive.min())) if len(positive) else 0.5
    return np.where(saliency > 0, saliency, least)


def distances(gated_sums: Values, logit_products: Values) -> Values:
    """How unlike experts are, [experts, experts], 0 to 1.

    d = 1 - ((cos(o_i, o_j) + 1) / 2 + s_gate) / 2. o is the mean gated output over the tokens
    routed to an expert; its divisor cancels. s_gate is 1 less half the Euclidean distance of the
    experts' logits over all tokens, each taken as a vector of unit length. What normalises that
    distance is not stated in what was read [U]; two is the largest that it can be.

    Args:
        gated_sums: [experts, hidden], sums of g * f.
        logit_products: [experts, experts], sums of z_i * z_j.
    """
    outputs = (cosines(gated_sums @ gated_sums.T) + 1) / 2
    apart = np.sqrt(np.maximum(2 - 2 * cosines(logit_products), 0))
    found: Values = 1 - (outputs + 1 - apart / 2) / 2
    return found


def owners(distance: Values, saliency: Values, centroids: Sequence[int], size: int) -> Owners:
    """Pseudo-pruning: the centroid that each expert joins, [experts].

    From the most salient centroid down, each takes in the nearest experts that are left, until its
    group has ``size`` members, itself included. So a few groups are large and most centroids stay
    as they are. With ``size`` 0, and for experts left over when all groups are full, each joins the
    centroid nearest to it. Of equals the first comes first.
    """
    found = np.arange(len(distance))
    left = [i for i in range(len(distance)) if i not in centroids]
    for centroid in sorted(centroids, key=lambda i: (-saliency[i], i)):
        nearest = sorted(left, key=lambda i: (distance[centroid, i], i))
        taken = nearest[: max(0, size - 1)]
        found[taken] = centroid
        left = [i for i in left if i not in taken]
    order = np.array(sorted(centroids))
    found[left] = order[distance[left][:, order].argmin(axis=1)]
    return found
