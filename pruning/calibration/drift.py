"""How far traffic has moved from what a plan was calibrated on.

Measured on the experts that tokens are sent to: the Jensen-Shannon divergence to base 2 of two
distributions over a layer's experts, 0 where they are equal, 1 where they share no expert.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from liveprune.pruning.calibration.statistics import RoutingStatistics, Values
from liveprune.pruning.plan import LayerPlan, Plan


def divergence(one: Values, other: Values) -> float:
    """Jensen-Shannon divergence to base 2 of two [experts] of counts, neither all zero."""
    p, q = one / one.sum(), other / other.sum()
    middle = (p + q) / 2
    return float(min(max((_relative(p, middle) + _relative(q, middle)) / 2, 0.0), 1.0))


def expected_usage(layer: LayerPlan, counts: Values) -> Values | None:
    """What the observer pass's counts [experts] become under a plan, by the plan's experts.

    An expert that is sliced off takes its tokens along, as if they never came: who would take them
    over is not in the counts. So a plan that prunes much has some drift from the start.

    Returns:
        [experts after the plan] where the plan merges, [experts] elsewhere; None where the plan
        scores its experts by a router map, which counts cannot say.
    """
    if layer.router_map is not None:
        return None
    if layer.expert_map:
        merged = np.zeros(layer.kept_experts)
        np.add.at(merged, list(layer.expert_map), counts)
        return merged
    kept = list(layer.kept)
    if layer.merges:
        return counts[kept]
    if layer.constants is not None:
        return counts
    there = np.zeros_like(counts)
    there[kept] = counts[kept]
    return there


def drift(
    plan: Plan, calibrated: RoutingStatistics, live: Mapping[int, Values]
) -> dict[int, float]:
    """Divergence of each layer that can be compared, by index.

    Args:
        plan: that serves.
        calibrated: what it was made from.
        live: tokens sent to each expert of its layers, columns as ``expected_usage``.
    """
    found = {}
    for layer in plan.layers:
        if layer.layer not in calibrated.layers or layer.layer not in live:
            continue
        expected = expected_usage(layer, calibrated.layers[layer.layer].counts)
        counts = live[layer.layer]
        if expected is not None and expected.sum() > 0 and counts.sum() > 0:
            found[layer.layer] = divergence(expected, counts)
    return found


def _relative(p: Values, q: Values) -> float:
    """Kullback-Leibler divergence to base 2; q is positive where p is."""
    there = p > 0
    return float(np.sum(p[there] * np.log2(p[there] / q[there])))
