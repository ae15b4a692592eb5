"""Build each MoE layer with its own expert count, top-k and router width.

While one decoder layer is built, the config shows that layer's counts, the gate gets as many rows
as its router needs, and a layer with a mapping gets the router that applies it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from liveprune.patches.compat import Seam
from liveprune.patches.hf_config import LAYERS_ATTRIBUTE
from liveprune.patches.live_config import live_config
from liveprune.pruning.architectures import Architecture, architecture_of
from liveprune.pruning.errors import IncompatibleEnvironmentError
from liveprune.pruning.model_spec import BLOCK_KEY

MAKE_LAYERS = Seam(
    "vllm.model_executor.models.utils", "make_layers", ("num_hidden_layers", "layer_fn", "prefix")
)
MAKE_LAYERS_USERS = tuple(
    f"vllm.model_executor.models.{name}"
    for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2")
)
GATE_INIT = Seam(
    "vllm.model_executor.layers.fused_moe.router.gate_linear",
    "GateLinear.__init__",
    (
        "self",
        "input_size",
        "output_size",
        "bias",
        "out_dtype",
        "params_dtype",
        "force_fp32_compute",
        "skip_bias_add",
        "quant_config",
        "prefix",
        "return_bias",
    ),
)
CREATE_ROUTER = Seam(
    "vllm.model_executor.layers.fused_moe.router.router_factory",
    "create_fused_moe_router",
    (
        "top_k",
        "global_num_experts",
        "renormalize",
        "use_grouped_topk",
        "num_expert_group",
        "topk_group",
        "scoring_func",
        "num_fused_shared_experts",
        "shared_expert_weight",
        "routed_scaling_factor",
        "e_score_correction_bias",
        "custom_routing_function",
        "eplb_state",
        "zero_expert_type",
        "num_logical_experts",
        "hash_indices_table",
        "bias_vl",
        "image_sentinel_lo",
        "skip_padding",
    ),
)
CREATE_ROUTER_USERS = ("vllm.model_executor.layers.fused_moe.layer",)


@dataclass
class _Building:
    """The layer that is being built."""

    experts: int
    gate_rows: int
    mapping: str
    """What stands between the gate's rows and the experts, see ``MoELayer``."""
    hidden: int
    parameters: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    """Of the mapping, by name of ``Architecture``'s fields."""
    router: Any = None
    """The one that applies the mapping."""


_building: _Building | None = None


def wrap_make_layers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Show each layer its own counts while it is built."""

    def make_layers(num_hidden_layers: int, layer_fn: Callable[..., Any], prefix: str) -> Any:
        from vllm.config import get_current_vllm_config
        from vllm.model_executor.models.utils import extract_layer_index

        vllm_config = get_current_vllm_config()
        config = vllm_config.model_config.hf_text_config
        table = getattr(config, LAYERS_ATTRIBUTE, None)
        _check_drafts(vllm_config.speculative_config, config)
        if table is None:
            return original(num_hidden_layers, layer_fn, prefix)
        _check_parallel(vllm_config, table)
        architecture = architecture_of({"model_type": config.model_type})

        def build(prefix: str) -> Any:
            counts = table.get(str(extract_layer_index(prefix)))
            if counts is None:  # a dense layer
                return layer_fn(prefix=prefix)
            with _layer_counts(config, architecture, *counts) as building:
                layer = layer_fn(prefix=prefix)
            # Beside the gate, where the checkpoint has them, so that vLLM's loader finds them.
            for name, parameter in building.parameters.items():
                block = getattr(layer, architecture.block)
                block.register_parameter(getattr(architecture, name), parameter)
            if "constants" in building.parameters:
                _add_constants(layer, building.router)
            return layer

        return original(num_hidden_layers, build, prefix)

    return make_layers


def wrap_gate_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give the gate of a layer with a mapping one row per original expert."""

    def gate_init(self: Any, input_size: int, output_size: int, *args: Any, **kwargs: Any) -> None:
        if _building is not None and _building.mapping and output_size == _building.experts:
            output_size = _building.gate_rows
        original(self, input_size, output_size, *args, **kwargs)

    return gate_init


def wrap_create_router(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make the router of a layer with a mapping, and put live variants before every router."""

    def create_fused_moe_router(*args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config

        router = _create_router(original, *args, **kwargs)
        if live_config(get_current_vllm_config()) is not None:
            from liveprune.patches.live_router import install
            from liveprune.patches.routing import RouterSpec

            install(router, RouterSpec.from_arguments(kwargs))
        return router

    return create_fused_moe_router


def _create_router(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _building is None or not _building.mapping:
        return original(*args, **kwargs)
    if _building.mapping != "router_map":
        return _mapped_router(original, _building, *args, **kwargs)
    from liveprune.patches.router_map import RouterMapRouter

    # Zeros and not empty memory: a map that is never loaded must not look like one.
    router_map = _parameter(torch.zeros(_building.experts, _building.gate_rows))
    _building.parameters["router_map"] = router_map
    return RouterMapRouter(
        top_k=kwargs["top_k"],
        global_num_experts=kwargs["global_num_experts"],
        renormalise=kwargs["renormalize"],
        scale=kwargs["routed_scaling_factor"],
        router_map=router_map,
    )


def _mapped_router(
    original: Callable[..., Any], building: _Building, *args: Any, **kwargs: Any
) -> Any:
    """Make the router that vLLM would for all gate rows, and put the map of experts behind it."""
    from liveprune.patches.mapped_router import MappedRouter

    bias = kwargs.get("e_score_correction_bias")
    if bias is not None:
        # The model made it for the new experts; it is the gate's, and the loader fills it in place.
        bias.data = bias.data.new_zeros(building.gate_rows)
    wide = {"global_num_experts": building.gate_rows, "num_logical_experts": building.gate_rows}
    own = original(*args, **{**kwargs, **wide})
    made = {"expert_map": torch.zeros(building.gate_rows, dtype=torch.int32)}
    if building.mapping == "constants":
        shape = (building.gate_rows - building.experts, building.hidden)
        # Not zeros: constants that are never loaded must not look like some.
        made["constants"] = torch.full(shape, torch.nan, dtype=torch.float32)
    building.parameters = {name: _parameter(value) for name, value in made.items()}
    building.router = MappedRouter(
        own,
        building.experts,
        building.parameters["expert_map"],
        building.parameters.get("constants"),
    )
    return building.router


def _parameter(value: torch.Tensor) -> torch.nn.Parameter:
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return torch.nn.Parameter(value.to(dtype), requires_grad=False)


def _add_constants(layer: Any, router: Any) -> None:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    from liveprune.patches.constant_experts import add_constants

    for module in layer.modules():
        if isinstance(module, MoERunner):
            add_constants(module.routed_experts, router)


@contextmanager
def _layer_counts(
    config: Any, architecture: Architecture, experts: int, top_k: int, gate_rows: int, mapping: str
) -> Iterator[_Building]:
    global _building  # noqa: PLW0603 - vLLM builds one model at a time in a process
    values = {architecture.count_key: experts, architecture.top_k_key: top_k}
    saved = {key: getattr(config, key) for key in values}
    _building = _Building(experts, gate_rows, mapping, config.hidden_size)
    try:
        for key, value in values.items():
            setattr(config, key, value)
        yield _building
    finally:
        _building = None
        for key, value in saved.items():
            setattr(config, key, value)


def _check_parallel(vllm_config: Any, table: dict[str, list[Any]]) -> None:
    parallel = vllm_config.parallel_config
    constant = [layer for layer, (*_, mapping) in table.items() if mapping == "constants"]
    flags = {
        "--enable-expert-parallel": parallel.enable_expert_parallel,
        "--data-parallel-size above 1": parallel.data_parallel_size > 1,
        "--prefill-context-parallel-size above 1": parallel.prefill_context_parallel_size > 1,
    }
    for flag in (name for name, there in flags.items() if there and constant):
        raise IncompatibleEnvironmentError(
            f"{flag}: layer {constant[0]} has experts that answer with constants, which one "
            f"tensor-parallel rank adds to what the others compute; expected no other ranks"
        )
    if parallel.enable_eplb:
        raise IncompatibleEnvironmentError(
            "--enable-eplb: expert load balancing needs one expert count for all layers; "
            f"this model has {sorted({c[0] for c in table.values()})}"
        )
    if parallel.enable_expert_parallel:
        ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
        for layer, (experts, *_) in table.items():
            if experts % ranks:
                raise IncompatibleEnvironmentError(
                    f"layer {layer}: {experts} experts, expected a multiple of the {ranks} "
                    f"expert-parallel ranks"
                )


def _check_drafts(speculative: Any, config: Any) -> None:
    """Multi-token-prediction layers keep their own experts; vLLM builds them with the model's."""
    if speculative is None or speculative.method not in ("mtp", "deepseek_mtp"):
        return
    table = getattr(config, LAYERS_ATTRIBUTE, None)
    stated = (getattr(config, BLOCK_KEY, None) or {}).get("mtp_experts")
    if table is None and stated is None:
        return
    experts = getattr(config, architecture_of({"model_type": config.model_type}).count_key)
    if table is not None or stated != experts:
        raise IncompatibleEnvironmentError(
            f"--speculative-config: the multi-token-prediction layers have "
            f"{stated or 'their own number of'} experts, and vLLM would build them with {experts} "
            f"like the pruned layers; serve this checkpoint without speculation"
        )
