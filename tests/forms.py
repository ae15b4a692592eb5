"""Random plans of every form whose merges are neuron by neuron, or whose gate keeps its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, NeuronMap, Plan

FORMS = ("constants", "merge+map", "neurons+kept", "neurons+map")


def form_plan(
    model: Path,
    form: str,
    *,
    kept: Sequence[int] = (0, 3, 4, 6),
    top_k: int | None = None,
    seed: int = 7,
) -> Plan:
    """As many new experts as ``kept``, in all layers; ``top_k`` in the last one."""
    spec = ModelSpec.from_path(model)
    rng = np.random.default_rng(seed)
    layers = []
    for base in spec.layers:
        last = base is spec.layers[-1]
        shape = (base.index, base.experts, top_k if top_k and last else base.top_k)
        layers.append(_layer(rng, form, shape, tuple(kept), spec))
    name = spec.architecture.model_type
    return Plan(name, spec.num_hidden_layers, tuple(layers), Lineage("test"), "org/base")


def _layer(
    rng: np.random.Generator,
    form: str,
    shape: tuple[int, int, int],
    kept: tuple[int, ...],
    spec: ModelSpec,
) -> LayerPlan:
    count, experts = len(kept), shape[1]
    expert_map = rng.permutation([*range(count), *rng.integers(0, count, experts - count)])
    if form == "constants":
        vectors = rng.normal(size=(experts - count, spec.hidden_size))
        return LayerPlan(*shape, kept, constants=vectors)
    if form == "merge+map":
        merge = rng.normal(size=(count, experts)) / 2
        return LayerPlan(*shape, merge=merge, expert_map=tuple(expert_map))
    neuron_map = random_neurons(rng, experts, count, spec.expert_size)
    shares = rng.uniform(0.5, 2, experts)
    if form == "neurons+kept":
        return LayerPlan(*shape, kept, neuron_map=neuron_map, neuron_shares=shares)
    return LayerPlan(
        *shape, expert_map=tuple(expert_map), neuron_map=neuron_map, neuron_shares=shares
    )


def random_neurons(rng: np.random.Generator, experts: int, count: int, size: int) -> NeuronMap:
    """New expert 0 is some old one as it is; of the rest each new neuron has one at least."""
    neuron_map = rng.integers(-1, count * size, (experts, size))
    neuron_map[(neuron_map >= 0) & (neuron_map < size)] = -1
    old = rng.permutation(experts)
    for new in range(count):
        neurons = np.arange(size) if new == 0 else rng.permutation(size)
        neuron_map[old[new]] = new * size + neurons
    return neuron_map.astype(np.int32)
