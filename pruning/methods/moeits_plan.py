"""What a method that compares experts two by two makes of a budget, or of tau instead of one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from liveprune.pruning.errors import PlanError
from liveprune.pruning.nmi import ESTIMATORS

if TYPE_CHECKING:
    from liveprune.pruning.budget import LayerBudget
    from liveprune.pruning.calibration.weights import Weights
    from liveprune.pruning.methods.method import Method
    from liveprune.pruning.methods.moeits_removals import Removals
    from liveprune.pruning.model_spec import Router


def check_options(
    method: Method, experts: object, tau: float | None, nmi: str, allocate: str, router: Router
) -> None:
    """Refuse options that the method does not have, or that contradict each other.

    Raises:
        PlanError: naming the option.
    """
    if allocate == "global" and not method.comparable:
        hint = "; for counts that differ by layer give tau" if method.from_pairs else ""
        raise PlanError(
            f"allocate is 'global', expected 'uniform': method {method.name} ranks the experts of "
            f"one layer{hint}"
        )
    if method.from_pairs is None:
        for name, value, default in (("tau", tau, None), ("nmi", nmi, "plain")):
            if value != default:
                raise PlanError(f"{name} is {value!r}, which method {method.name} does not have")
        if experts is None:
            raise PlanError(f"method {method.name}: found no budget, expected experts")
        return
    if (experts is None) == (tau is None):
        found = "neither" if tau is None else "both"
        raise PlanError(
            f"method {method.name}: found {found} of experts and tau, expected one of them"
        )
    if nmi not in ESTIMATORS:
        raise PlanError(f"nmi is {nmi!r}, expected one of {', '.join(ESTIMATORS)}")
    if tau is not None and not math.isfinite(tau):
        raise PlanError(f"tau is {tau}, expected a finite number")
    if tau is not None and router.groups > 1:
        raise PlanError(
            f"tau is {tau}, expected experts instead: this router picks among {router.groups} "
            f"groups, which must keep the same number of experts, and tau leaves any number in each"
        )


def compare_experts(
    method: Method,
    weights: Weights,
    budgets: Sequence[LayerBudget],
    nmi: str,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> dict[int, Removals]:
    """Removals of every layer that is not skipped; a step of progress is one pair's matrix."""
    if method.from_pairs is None:
        raise ValueError(f"method {method.name}: does not compare experts")
    compared = [b.layer for b in budgets if not b.skipped]
    total = sum(3 * x.experts * (x.experts - 1) // 2 for x in compared)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return {
        layer.index: method.from_pairs(weights.layers[layer.index], nmi, seed, step)
        for layer in compared
    }


def ranks(
    removals: Mapping[int, Removals], budgets: Sequence[LayerBudget]
) -> dict[int, npt.NDArray[np.float64]]:
    """Scores by layer index: when each expert goes; in a skipped layer, which keeps all, 0."""
    return {
        b.layer.index: np.zeros(b.layer.experts) if b.skipped else removals[b.layer.index].scores()
        for b in budgets
    }


def least(budgets: Sequence[LayerBudget]) -> list[LayerBudget]:
    """The budgets of the plan that tau gives at worst."""
    return [b if b.skipped else dataclasses.replace(b, keep=b.floor) for b in budgets]


def counts_by_tau(
    removals: Mapping[int, Removals],
    tau: float,
    budgets: Sequence[LayerBudget],
    protected: Mapping[int, tuple[int, ...]],
) -> dict[int, int]:
    """How many experts each layer keeps at ``tau``, by layer index."""
    counts = {}
    for budget in budgets:
        index = budget.layer.index
        counts[index] = budget.layer.experts
        if not budget.skipped:
            ids = protected.get(index, ())
            counts[index] = len(removals[index].kept(tau, budget.floor, ids))
    return counts


def removals_to_json(
    removals: Mapping[int, Removals], tau: float | None, counts: Mapping[int, int]
) -> dict[str, Any]:
    """For the lineage, by layer: order and NMI of all removals, also of those not carried out.

    ``stopped_by`` says what ended them: the budget, the threshold, or the fewest experts that the
    layer can be served with although a pair was still above the threshold.
    """
    form: dict[str, Any] = {}
    for index, item in removals.items():
        form[str(index)] = {
            "mean": item.mean,
            "iqr": item.iqr,
            "removed": list(item.removed),
            "nmi": list(item.nmi),
            "stopped_by": "budget",
        }
        if tau is not None:
            short = item.experts - counts[index] < item.above(tau)
            form[str(index)] |= {
                "threshold": item.threshold(tau),
                "stopped_by": "floor" if short else "threshold",
            }
    return form
