"""MoE-I2: how much the model's loss needs each expert, and how many each layer gives up.

arXiv:2411.01016 (methods.md, 7.3), read at second hand: the importance is as the paper is said to
define it, the exact rule from importance to counts is unknown. Here it is that of a third-party
implementation: removals in proportion to 1 / importance, largest remainders, capped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from liveprune.pruning.allocation import proportional
from liveprune.pruning.calibration.rows import BATCH_TOKENS, Rows
from liveprune.pruning.errors import DataError, PlanError
from liveprune.pruning.evaluation.engine import Engine, TokenRow
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.model_spec import ModelSpec, MoELayer
from liveprune.pruning.plan import Lineage, Plan

Values = npt.NDArray[np.float64]


def load_engine(model: Path, rows: Rows, *, device: str, dtype: str) -> Engine:
    """The model in transformers, whole, with batches of at most ``BATCH_TOKENS`` tokens."""
    from liveprune.pruning.evaluation.transformers_engine import TransformersEngine

    longest = max(len(row) for row in rows.token_ids)
    batch_rows = max(1, BATCH_TOKENS // longest)
    return TransformersEngine(model, device=device, dtype=dtype, batch_rows=batch_rows)


def expert_losses(
    engine: Engine,
    spec: ModelSpec,
    rows: Rows,
    layers: Sequence[MoELayer],
    step: Callable[[], None],
) -> dict[int, Values]:
    """The model's loss without each expert: [experts] float64 by layer index.

    The loss is the mean negative log-likelihood, in nats, of every token of the rows but their
    first. An expert is missed as in a pruned checkpoint: its gate row is gone, too.

    Args:
        engine: Of the base model.
        spec: Of the base model.
        rows: Those with two tokens or more are used.
        layers: Whose experts are left out, one at a time.
        step: Called after each layer; one call of the engine scores all its experts.

    Raises:
        DataError: no row has two tokens.
        EngineError: the engine failed.
    """
    ids = [tuple(row.tolist()) for row in rows.token_ids if len(row) > 1]
    if not ids:
        raise DataError("calibration rows: found none with 2 tokens or more, expected at least 1")
    scored = [TokenRow(row[:1], row[1:]) for row in ids]
    losses = {}
    for layer in layers:
        plans = [_without(spec, layer.index, expert) for expert in range(layer.experts)]
        found = engine.score(plans, scored)
        losses[layer.index] = np.array([-float(x.logprobs.mean()) for x in found])
        step()
    return losses


def _without(spec: ModelSpec, index: int, expert: int) -> Plan:
    layers = []
    for layer in spec.layers:
        gone = {expert} if layer.index == index else set()
        kept = tuple(i for i in range(layer.experts) if i not in gone)
        layers.append(LayerPlan(layer.index, layer.experts, min(layer.top_k, len(kept)), kept))
    return Plan(
        spec.architecture.model_type, spec.num_hidden_layers, tuple(layers), Lineage("moe-i2")
    )


def removal_counts(
    importance: Mapping[int, float], caps: Mapping[int, int], removals: int
) -> dict[int, int]:
    """Share ``removals`` out over layers in proportion to 1 / importance, none above its cap.

    What is beyond a layer's cap goes to the others in their proportion. Parts of an expert are
    settled by largest remainders, of equal ones the earlier layer's. A layer of importance 0 is
    filled before all others; an infinite one gives only what no other can.

    Args:
        importance: By layer index; at least 0.
        caps: Most removals of each of these layers.
        removals: In all; at most the sum of the caps.

    Returns:
        Removals by layer index.

    Raises:
        PlanError: an importance is NaN or negative, or the caps do not hold the removals.
    """
    for index, value in importance.items():
        if not value >= 0:
            raise PlanError(f"layer {index}: importance is {value}, expected a number from 0 on")
    if removals > sum(caps.values()):
        raise PlanError(
            f"found {removals} experts to remove, expected at most {sum(caps.values())}"
        )
    counts = dict.fromkeys(importance, 0)
    ranks = [
        [i for i, value in importance.items() if value == 0],
        [i for i, value in importance.items() if 0 < value < math.inf],
        [i for i, value in importance.items() if value == math.inf],
    ]
    for number, layers in enumerate(ranks):
        part = min(removals - sum(counts.values()), sum(caps[i] for i in layers))
        equal = number != 1
        shares = {i: Fraction(1) if equal else 1 / Fraction(importance[i]) for i in layers}
        counts |= proportional(shares, caps, part)
    return counts
