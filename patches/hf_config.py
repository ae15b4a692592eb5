"""Let vLLM see a uniform config, and keep the counts of each layer beside it.

vLLM reads expert counts from one scalar in many places; transformers refuses that read where layers
differ. Here the scalar becomes the maximum, and the layers' own counts travel as a plain attribute
of the config, which reaches engine and workers with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from liveprune.patches.compat import Seam
from liveprune.pruning.architectures import ARCHITECTURES
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.model_spec import BLOCK_KEY, LIST_KEYS, ModelSpec

LAYERS_ATTRIBUTE = "liveprune_layers"
"""``{str(layer): [experts, top_k, gate rows, mapping]}``; JSON-like, so part of vLLM's config hash.

The mapping (``MoELayer.mapping``) says what stands between the gate's rows and the experts, which
may be as many. Without one the text is empty and the rows are given as 0.
"""

GET_CONFIG = Seam(
    "vllm.transformers_utils.config",
    "get_config",
    (
        "model",
        "trust_remote_code",
        "revision",
        "code_revision",
        "config_format",
        "hf_overrides_kw",
        "hf_overrides_fn",
        "kwargs",
    ),
)


def wrap_get_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adapt what vLLM reads from ``config.json``."""

    def get_config(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        adapt_config(config)
        return config

    return get_config


def adapt_config(config: Any) -> None:
    """Make a pruned checkpoint's config uniform in place; leave every other config alone.

    Raises:
        CheckpointError: layers differ in more than expert counts and top-k.
    """
    raw = config.to_dict()
    if not needs_layers(raw):
        return
    spec = ModelSpec.from_config(raw)
    _check_overrides(spec, raw)
    config.per_layer_config = None
    architecture = spec.architecture
    setattr(config, architecture.count_key, max(x.experts for x in spec.layers))
    setattr(config, architecture.top_k_key, max(x.top_k for x in spec.layers))
    if not spec.is_uniform:
        table = {
            str(x.index): [x.experts, x.top_k, x.router_width if x.mapping else 0, x.mapping]
            for x in spec.layers
        }
        setattr(config, LAYERS_ATTRIBUTE, table)


def needs_layers(raw: Mapping[str, Any]) -> bool:
    """Whether a config may hold counts per layer, of a family that Liveprune knows."""
    if raw.get("model_type") not in ARCHITECTURES:
        return False
    keys = (BLOCK_KEY, "per_layer_config", *LIST_KEYS)
    return any(raw.get(key) is not None for key in keys)


def _check_overrides(spec: ModelSpec, raw: Mapping[str, Any]) -> None:
    architecture = spec.architecture
    known = {architecture.count_key, *architecture.count_aliases, architecture.top_k_key}
    for layer, override in (raw.get("per_layer_config") or {}).items():
        others = sorted(set(override) - known)
        if others:
            raise CheckpointError(
                f"config.json: per_layer_config of layer {layer} holds {others}; "
                f"expected only {sorted(known)}"
            )
