"""A budget in bytes: as many experts as leave all weights of the checkpoint within a target.

Counted from the shards' headers, for what ``apply_plan`` writes: each expert's tensors, its gate
rows and side tensors, and, where the gate keeps all rows, what maps them; everything else as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from liveprune.pruning.budget import Budget
from liveprune.pruning.checkpoint.layer_tensors import LayerTensors, layer_tensors
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint
from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import ModelSpec


@dataclass(frozen=True)
class LayerCost:
    """Bytes of one layer's routed part."""

    experts: int
    expert: int
    """Of one expert's tensors."""
    gate_row: int
    """Of one gate row with its side tensors."""
    mapping: int = 0
    """Of what maps gate rows onto experts, where the gate keeps all rows; 0: it is sliced."""
    constant: int = 0
    """Of what a pruned expert leaves behind."""

    def bytes_of(self, kept: int) -> int:
        """Bytes of the layer with so many experts."""
        if kept == self.experts:  # left as it is
            return self.experts * (self.expert + self.gate_row)
        rows = self.experts if self.mapping else kept
        gone = (self.experts - kept) * self.constant
        return kept * self.expert + rows * self.gate_row + self.mapping + gone


@dataclass(frozen=True)
class Costs:
    """Bytes of a checkpoint's weights, by what a plan can change."""

    layers: Mapping[int, LayerCost]
    fixed: int
    """Of all that no plan changes."""

    def bytes_of(self, counts: Mapping[int, int]) -> int:
        """Bytes of all weights with so many experts in each layer."""
        return self.fixed + sum(cost.bytes_of(counts[i]) for i, cost in self.layers.items())


def costs_of(
    model: Path, spec: ModelSpec, *, keep_gate_rows: bool = False, constants: bool = False
) -> Costs:
    """Read the headers of ``model``.

    Raises:
        CheckpointError: weights are missing or damaged.
    """
    entries = read_checkpoint(model).tensors
    layers = {
        block.layer.index: _cost(block, spec, keep_gate_rows=keep_gate_rows, constants=constants)
        for block in layer_tensors(entries, spec)
    }
    whole = sum(entry.size for entry in entries.values())
    routed = sum(cost.bytes_of(cost.experts) for cost in layers.values())
    return Costs(layers, whole - routed)


def _cost(
    block: LayerTensors, spec: ModelSpec, *, keep_gate_rows: bool, constants: bool
) -> LayerCost:
    experts = block.layer.experts
    return LayerCost(
        experts=experts,
        expert=block.expert_bytes // experts,
        gate_row=sum(entry.size for entry in block.gate.values()) // experts,
        mapping=4 * experts if keep_gate_rows or constants else 0,
        constant=4 * spec.hidden_size if constants else 0,
    )


def budget_for(
    costs: Costs,
    spec: ModelSpec,
    target: int,
    *,
    floors: Mapping[int, int],
    skip_layers: Collection[int],
    allocate: str,
) -> Budget:
    """The largest budget whose checkpoint has at most ``target`` bytes of weights.

    Uniform: the same number in every layer that has as many. Across layers: a total, counted with
    the dearest layer's experts where they differ, so that it holds wherever they go.

    Args:
        costs: of the model.
        spec: of the same.
        target: bytes.
        floors: fewest experts of each layer with which it can be served.
        skip_layers: left as they are.
        allocate: ``uniform`` or ``global``.

    Raises:
        PlanError: the least that can be served is more than the target, or all of the model less.
    """
    full = {layer.index: layer.experts for layer in spec.layers}
    least = {i: full[i] if i in skip_layers else floors[i] for i in full}
    if costs.bytes_of(least) > target:
        raise PlanError(
            f"target_memory is {target:,} bytes, expected at least {costs.bytes_of(least):,}: what "
            f"the model takes with the fewest experts that its layers can be served with"
        )
    if costs.bytes_of(full) <= target:
        raise PlanError(
            f"target_memory is {target:,} bytes, expected less than {costs.bytes_of(full):,}, what "
            f"the whole model takes: there is nothing to prune"
        )
    unit = spec.router.groups
    if allocate == "uniform":
        most = max(count for i, count in full.items() if i not in skip_layers)
        for keep in range(most - most % unit, 0, -unit):
            counts = {
                i: full[i] if i in skip_layers else max(least[i], min(keep, full[i])) for i in full
            }
            if costs.bytes_of(counts) <= target:
                return Budget(counts=tuple(counts[layer.index] for layer in spec.layers))
    open_layers = [i for i in full if i not in skip_layers]
    dearest = max(costs.layers[i].bytes_of(1) - costs.layers[i].bytes_of(0) for i in open_layers)
    # From the least upwards: a layer that is not whole has its mapping's bytes, too.
    room = target - costs.bytes_of(least)
    total = sum(least[i] for i in open_layers) + room // (unit * dearest) * unit
    return Budget(total=min(total, sum(full[i] for i in open_layers)))
