"""Refuse a damaged pruned checkpoint by name, before and while its tensors are read.

vLLM's own loader leaves rows of missing experts unset and skips tensors it does not know; on a
pruned checkpoint either means wrong answers without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from liveprune.patches.compat import Seam
from liveprune.patches.hf_config import LAYERS_ATTRIBUTE
from liveprune.pruning.checkpoint.verify import check_finite, verify_checkpoint
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.model_spec import BLOCK_KEY, ModelSpec

MAPPINGS = (".router_map", ".constants")
"""Ends of the names of Liveprune's own tensors that hold numbers."""
GET_ALL_WEIGHTS = Seam(
    "vllm.model_executor.model_loader.default_loader",
    "DefaultModelLoader.get_all_weights",
    ("self", "model_config", "model"),
)


def wrap_get_all_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """Verify the files of a pruned checkpoint, then check each expert tensor as it passes."""

    def get_all_weights(self: Any, model_config: Any, model: Any) -> Iterator[Any]:
        weights = original(self, model_config, model)
        config = model_config.hf_config
        if not hasattr(config, BLOCK_KEY) and not hasattr(config, LAYERS_ATTRIBUTE):
            return weights  # type: ignore[no-any-return]
        folder = self._prepare_weights(
            model_config.model,
            None,
            model_config.revision,
            fall_back_to_pt=False,
            allow_patterns_overrides=None,
        )[0]
        verify_checkpoint(Path(folder))
        return _checked(weights, Path(folder))

    return get_all_weights


def _checked(weights: Iterator[Any], folder: Path) -> Iterator[Any]:
    for name, tensor in weights:
        if ".experts." in name or ".gate." in name or name.endswith(MAPPINGS):
            check_finite(name, tensor)
        if name.endswith(".expert_map"):
            _check_expert_map(name, tensor, ModelSpec.from_path(folder))
        yield name, tensor


def _check_expert_map(name: str, tensor: torch.Tensor, spec: ModelSpec) -> None:
    """Kernels check no ids: one that names no expert would read foreign memory."""
    architecture = spec.architecture
    names = {
        f"{architecture.block_prefix(layer.index)}{architecture.expert_map}": layer
        for layer in spec.layers
    }
    layer = names.get(name)
    if layer is None or layer.mapping not in ("expert_map", "constants"):
        raise CheckpointError(f"{name}: found an expert map; expected none by config.json")
    wanted = layer.router_width - layer.experts if layer.mapping == "constants" else 0
    constant, shape = int((tensor == -1).sum()), (layer.router_width,)
    within = bool(((tensor >= -1) & (tensor < layer.experts)).all())
    if tensor.shape != shape or not within or constant != wanted:
        raise CheckpointError(
            f"{name}: found {list(tensor.shape)} of {int(tensor.min())} to {int(tensor.max())}, "
            f"{constant} of them -1; expected {list(shape)} of experts 0 to {layer.experts - 1} "
            f"and {wanted} times -1"
        )
