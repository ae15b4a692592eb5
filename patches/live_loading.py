"""Load a model without its experts: shapes first, rows later.

With live variants on, the fused expert tensors are created without memory, vLLM's loader does not
read the experts, and after loading each layer gets elastic rows that the worker fills. Starting
whole and starting compact are the same path; they fill other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from liveprune.patches.compat import Seam
from liveprune.patches.live_config import live_config
from liveprune.pruning.checkpoint.layer_tensors import layer_tensors
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint
from liveprune.pruning.model_spec import ModelSpec

CREATE_WEIGHTS = Seam(
    "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method",
    "UnquantizedFusedMoEMethod.create_weights",
    (
        "self",
        "layer",
        "num_experts",
        "hidden_size",
        "intermediate_size_per_partition",
        "params_dtype",
        "extra_weight_attrs",
    ),
)
PROCESS_WEIGHTS = Seam(
    "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method",
    "UnquantizedFusedMoEMethod.process_weights_after_loading",
    ("self", "layer"),
)
SKIP_WEIGHT = Seam(
    "vllm.model_executor.model_loader.ep_weight_filter",
    "should_skip_weight",
    ("weight_name", "local_expert_ids"),
)
SKIP_WEIGHT_USERS = ("vllm.model_executor.model_loader.weight_utils",)
PROCESS_MODEL = Seam(
    "vllm.model_executor.model_loader.utils",
    "process_weights_after_loading",
    ("model", "model_config", "target_device"),
)
PROCESS_MODEL_USERS = ("vllm.model_executor.model_loader.base_loader",)
SELECT_FORWARD = Seam(
    "vllm.model_executor.layers.fused_moe.runner.moe_runner",
    "MoERunner._select_forward",
    ("self",),
)
LOAD_MODEL = Seam("vllm.v1.worker.gpu_worker", "Worker.load_model", ("self", "load_dummy_weights"))

_skipped: frozenset[str] = frozenset()
"""Names of the tensors that the loader must not read; empty unless a live model is loading."""


def wrap_create_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """Create the expert parameters of a live model without memory."""

    def create_weights(self: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
        if not _skipped:
            original(self, layer, *args, **kwargs)
            return
        with torch.device("meta"):
            original(self, layer, *args, **kwargs)

    return create_weights


def wrap_process_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """Build the kernel of a layer without weights; the worker gives it its rows."""

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        if layer.w13_weight.device.type != "meta":
            original(self, layer)
            return
        self._init_moe_kernel(layer)

    return process_weights_after_loading


def wrap_process_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Note the bytes of the other weights: on a CPU, packing consumes their parameters."""

    def process_weights_after_loading(model: Any, *args: Any, **kwargs: Any) -> None:
        if _skipped:
            model.liveprune_weight_bytes = sum(
                x.numel() * x.element_size() for x in model.parameters() if not x.is_meta
            )
        original(model, *args, **kwargs)

    return process_weights_after_loading


def wrap_should_skip_weight(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the loader from reading experts."""

    def should_skip_weight(weight_name: str, local_expert_ids: set[int] | None) -> bool:
        return weight_name in _skipped or bool(original(weight_name, local_expert_ids))

    return should_skip_weight


def wrap_select_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep routing out of compiled code, on the CPU as vLLM does on CUDA.

    What is traced then does not know how many experts are active, so fewer need no second trace.
    """

    def select_forward(self: Any) -> Any:
        from vllm.config import CompilationMode, get_current_vllm_config
        from vllm.platforms import current_platform

        vllm_config = get_current_vllm_config()
        compiled = vllm_config.compilation_config.mode != CompilationMode.NONE
        if not (current_platform.is_cpu() and compiled and live_config(vllm_config)):
            return original(self)
        ops = torch.ops.vllm
        return ops.moe_forward if self._shared_experts is None else ops.moe_forward_shared

    return select_forward


def wrap_load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Load without experts, then start the worker's live part."""

    def load_model(self: Any, *, load_dummy_weights: bool = False) -> None:
        from liveprune.patches.live_worker import LiveWorker

        config = live_config(self.vllm_config)
        if config is None:
            original(self, load_dummy_weights=load_dummy_weights)
            return
        with _without_experts(Path(config.checkpoint)):
            original(self, load_dummy_weights=load_dummy_weights)
        # glibc keeps freed blocks up to the largest that was freed once (32 MiB at most), and maps
        # greater ones anew each time. Stock vLLM frees such blocks while it loads experts; without
        # that every prefill would fault its temporary tensors in again (benchmarks.md).
        warm = torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8, device="cpu")
        del warm
        self.liveprune_worker = LiveWorker(self, config)

    return load_model


@contextmanager
def _without_experts(checkpoint: Path) -> Iterator[None]:
    global _skipped  # noqa: PLW0603 - vLLM loads one model at a time in a process
    spec = ModelSpec.from_path(checkpoint)
    blocks = layer_tensors(read_checkpoint(checkpoint).tensors, spec)
    _skipped = frozenset(entry.name for block in blocks for entry in block.expert_tensors())
    try:
        yield
    finally:
        _skipped = frozenset()
