"""The entry point that vLLM loads in every process (API server, engine, workers).

Patches are wrappers which step aside unless the model at hand needs them, so a plain checkpoint
runs on untouched vLLM classes and code paths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from liveprune.patches import hf_config, layers, model_cards, weights
from liveprune.patches.compat import Seam, check_seam, check_version


@dataclass(frozen=True)
class Patch:
    """A seam, and the function that makes its replacement from the original."""

    seam: Seam
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    also: tuple[str, ...] = ()
    """Modules that bind the function by name at import."""


PATCHES: tuple[Patch, ...] = (
    Patch(hf_config.GET_CONFIG, hf_config.wrap_get_config, ("vllm.config.model",)),
    Patch(layers.MAKE_LAYERS, layers.wrap_make_layers, layers.MAKE_LAYERS_USERS),
    Patch(layers.GATE_INIT, layers.wrap_gate_init),
    Patch(layers.CREATE_ROUTER, layers.wrap_create_router, layers.CREATE_ROUTER_USERS),
    Patch(weights.GET_ALL_WEIGHTS, weights.wrap_get_all_weights),
    Patch(model_cards.SHOW_MODELS, model_cards.wrap_show_models),
)

_MARK = "__liveprune_patch__"


def register() -> None:
    """Check this vLLM and apply all patches; a second call does nothing.

    Raises:
        IncompatibleEnvironmentError: unknown vLLM version, or a patched function has changed.
    """
    import vllm

    check_version(vllm.__version__)
    for patch in PATCHES:
        check_seam(patch.seam)
    for patch in PATCHES:
        _apply(patch)


def _apply(patch: Patch) -> None:
    import importlib
    import sys

    original = patch.seam.resolve()
    if hasattr(original, _MARK):
        return
    replacement = functools.wraps(original)(patch.wrap(original))
    setattr(replacement, _MARK, True)
    owner: Any = importlib.import_module(patch.seam.module)
    *path, name = patch.seam.qualname.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, replacement)
    for module in patch.also:
        # Only modules that are loaded already have bound the original.
        if module in sys.modules and getattr(sys.modules[module], name, None) is original:
            setattr(sys.modules[module], name, replacement)
