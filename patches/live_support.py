"""Which engines can have live variants, and what turns them off.

Checked in the API server's process as soon as vLLM has made its config, before any weight is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from liveprune.patches.compat import Seam
from liveprune.patches.hf_config import LAYERS_ATTRIBUTE
from liveprune.patches.live_config import CONFIG_KEY, OFF_KEY, live_config
from liveprune.pruning.architectures import ARCHITECTURES
from liveprune.pruning.errors import IncompatibleEnvironmentError

logger = logging.getLogger("liveprune")

CREATE_CONFIG = Seam(
    "vllm.engine.arg_utils",
    "EngineArgs.create_engine_config",
    ("self", "usage_context", "headless"),
)


def wrap_create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Turn live variants off where they cannot work, or refuse if they were asked for by name."""

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        config = live_config(vllm_config)
        if config is None:
            return vllm_config
        reason = unsupported(vllm_config)
        if reason is None:
            _force_modular_kernel(vllm_config)
            return vllm_config
        if config.required:
            raise IncompatibleEnvironmentError(f"live variants cannot work with {reason}")
        logger.warning("live variants are off: they cannot work with %s", reason)
        del vllm_config.additional_config[CONFIG_KEY]
        vllm_config.additional_config[OFF_KEY] = reason
        return vllm_config

    return create_engine_config


def unsupported(vllm_config: Any) -> str | None:
    """The first thing in vLLM's config that live variants cannot work with, or None."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    model_type = model.hf_text_config.model_type
    found = {
        f"the model family {model_type!r} (known: {', '.join(sorted(ARCHITECTURES))})": (
            model_type not in ARCHITECTURES
        ),
        f"quantised weights ({model.quantization})": model.quantization is not None,
        "--speculative-config": vllm_config.speculative_config is not None,
        "--enable-lora": vllm_config.lora_config is not None,
        "--enable-expert-parallel": parallel.enable_expert_parallel,
        "--enable-eplb": parallel.enable_eplb,
        "--pipeline-parallel-size above 1": parallel.pipeline_parallel_size > 1,
        "--data-parallel-size above 1": parallel.data_parallel_size > 1,
        "--prefill-context-parallel-size above 1": parallel.prefill_context_parallel_size > 1,
        "--enable-dbo": parallel.enable_dbo,
        "--ubatch-size": parallel.ubatch_size > 1,
        "--api-server-count above 1": parallel._api_process_count > 1,  # noqa: SLF001
        f"--load-format {vllm_config.load_config.load_format}": (
            vllm_config.load_config.load_format not in ("auto", "hf", "safetensors")
        ),
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--enable-sleep-mode": model.enable_sleep_mode,
        "--runner pooling": model.runner_type != "generate",
        "a checkpoint that maps its gate's rows onto fewer experts": _maps_experts(
            model.hf_text_config
        ),
    }
    return next((name for name, is_there in found.items() if is_there), None)


def _maps_experts(config: Any) -> bool:
    """Other than by a router map, under which variants have their own path."""
    layers = getattr(config, LAYERS_ATTRIBUTE, None) or {}
    return any(mapping not in ("", "router_map") for *_, mapping in layers.values())


def _force_modular_kernel(vllm_config: Any) -> None:
    """Kernels that route by themselves would pass the routing tables by."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda() and vllm_config.kernel_config.moe_backend == "auto":
        vllm_config.kernel_config.moe_backend = "triton"
