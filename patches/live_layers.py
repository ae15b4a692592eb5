"""The layers with experts of a loaded model, made ready for live variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from liveprune.patches.batch_slots import BatchSlots
from liveprune.patches.constant_experts import add_constants
from liveprune.patches.expert_packing import Packing
from liveprune.patches.expert_rows import ExpertRows
from liveprune.patches.live_config import LiveConfig
from liveprune.patches.live_router import LiveRouting
from liveprune.patches.live_statistics import LiveStatistics
from liveprune.patches.routing_tables import LayerTables
from liveprune.patches.sampled_outputs import SampledOutputs
from liveprune.pruning.model_spec import ModelSpec


@dataclass(frozen=True)
class LiveLayer:
    """One layer with experts."""

    index: int
    experts: int
    tables: LayerTables
    rows: ExpertRows
    packing: Packing
    moe: Any
    """vLLM's MoERunner."""


def find_layers(
    model: Any, spec: ModelSpec, config: LiveConfig, batch: BatchSlots, device: torch.device
) -> dict[int, LiveLayer]:
    """Give every layer with experts its tables and rows, none of them resident; by index.

    Args:
        model: vLLM's, loaded without experts.
        spec: of the checkpoint.
        config: how many slots and spare rows.
        batch: which token is whose.
        device: of tables and rows.

    Raises:
        EngineError: a layer's layout cannot have elastic rows.
    """
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.models.utils import extract_layer_index

    layers = {}
    for module in model.modules():
        if isinstance(module, MoERunner):
            index = extract_layer_index(module.layer_name)
            layers[index] = _layer(index, module, spec, config, batch, device)
    return layers


def _layer(
    index: int,
    moe: Any,
    spec: ModelSpec,
    config: LiveConfig,
    batch: BatchSlots,
    device: torch.device,
) -> LiveLayer:
    routing: LiveRouting = moe.router._compute_routing  # noqa: SLF001 - put there by layers.py
    base, packing = spec.layer(index), Packing.of(moe.routed_experts)
    tables = LayerTables(
        config.slots,
        base.experts,
        config.spare_rows,
        base.top_k,
        hidden=packing.hidden,
        base_map=getattr(moe.router, "router_map", None),
        device=device,
    )
    routing.attach(tables, batch)
    add_constants(moe.routed_experts, routing)
    rows = ExpertRows(moe.routed_experts, packing, base.experts + config.spare_rows, device)
    return LiveLayer(index, base.experts, tables, rows, packing, moe)


def batch_slots(worker: Any, config: LiveConfig) -> BatchSlots:
    """The slots of the running batch, for vLLM's ``worker``."""
    from vllm.config import CUDAGraphMode

    graphs = worker.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
    return BatchSlots(
        worker.model_runner.max_num_tokens,
        worker.device,
        static=worker.device.type == "cuda" and graphs,
        default=config.resident_slot,
    )


def live_statistics(
    layers: Mapping[int, LiveLayer],
    config: LiveConfig,
    batch: BatchSlots,
    dtype: torch.dtype,
    device: torch.device,
) -> LiveStatistics | None:
    """Have the layers' routing counted; None where the config says not to.

    Args:
        layers: by index.
        config: whether, and how many tokens are sampled.
        batch: which token is whose.
        dtype: of hidden states.
        device: of the sums.
    """
    if not config.statistics:
        return None
    outputs = None
    if config.sample_tokens:
        outputs = SampledOutputs(
            {index: (layer.moe, layer.tables) for index, layer in layers.items()},
            max(layer.moe.moe_config.hidden_dim for layer in layers.values()),
            dtype,
            device,
            static=batch.static,
            size=config.sample_tokens,
            every=config.sample_every,
        )
    tables = {index: layer.tables for index, layer in layers.items()}
    found = LiveStatistics(tables, batch, device, outputs=outputs)
    for index, layer in layers.items():
        layer.moe.router._compute_routing.record = found.recorder(index)  # noqa: SLF001 - ours
    return found
