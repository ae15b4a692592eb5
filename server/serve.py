"""``liveprune serve``: vLLM's own OpenAI server, with the checkpoint checked first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from liveprune.pruning.checkpoint.verify import verify_checkpoint
from liveprune.pruning.errors import ArchitectureError, IncompatibleEnvironmentError
from liveprune.pruning.model_spec import BLOCK_KEY, ModelSpec
from liveprune.pruning.plan_io import CHECKPOINT_PLAN
from liveprune.server.model_path import check_not_a_path

MIDDLEWARE = "liveprune.server.openai_errors.OpenAIErrorMiddleware"


def check_model(model: str) -> str:
    """Check a local pruned checkpoint before vLLM starts; return one line that says what it is.

    Raises:
        LiveprunError: files are missing, damaged or contradict the config.
    """
    path = Path(model)
    if not path.is_dir():
        check_not_a_path(model)
        return f"{model}: not a local folder, vLLM resolves it"
    try:
        spec = ModelSpec.from_path(path)
    except ArchitectureError as error:
        # vLLM serves more families than Liveprune can prune.
        return f"{model}: served by vLLM as it is ({error})"
    if BLOCK_KEY in spec.config or not spec.is_uniform or (path / CHECKPOINT_PLAN).exists():
        # Others are vLLM's to judge: it reads more formats than safetensors.
        verify_checkpoint(path)
    return f"{model}: {summary(spec)}"


def summary(spec: ModelSpec) -> str:
    """One line: family, layers, experts and top-k per layer, plan."""
    experts = _span([layer.experts for layer in spec.layers])
    top_k = _span([layer.top_k for layer in spec.layers])
    block = spec.config.get(BLOCK_KEY) or {}
    plan = f", plan {block['plan']}" if "plan" in block else ""
    return (
        f"{spec.architecture.model_type}, {len(spec.layers)} layers with {experts} experts, "
        f"top-{top_k}{plan}"
    )


def vllm_arguments(model: str, flags: Sequence[str]) -> list[str]:
    """The arguments for ``vllm serve``: everything passes through; ours comes on top."""
    return [model, *flags, "--middleware", MIDDLEWARE]


def check_plugin_enabled() -> None:
    """Refuse an environment in which vLLM would not load the plugin."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "liveprune" not in allowed.split(","):
        raise IncompatibleEnvironmentError(
            f"VLLM_PLUGINS is {allowed!r} and leaves out liveprune; unset it or add liveprune"
        )


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
