"""The entry point that vLLM loads in every process (API server, engine, workers).

Patches are wrappers which step aside unless the model at hand needs them, so a plain checkpoint
runs on untouched vLLM classes and code paths.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from liveprune.patches import (
    admission,
    admitted_sequences,
    batch_slots,
    cache_salt,
    entry,
    hf_config,
    kv_growth,
    kv_memory,
    layers,
    live_loading,
    live_support,
    model_cards,
    request_meter,
    request_scoring,
    request_spans,
    user_traffic,
    weights,
)
from liveprune.patches.compat import Seam, check_seam, check_version
from liveprune.patches.orphans import end_with_parent


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
    # Live variants; each steps aside without a live config.
    Patch(live_support.CREATE_CONFIG, live_support.wrap_create_engine_config),
    Patch(live_loading.CREATE_WEIGHTS, live_loading.wrap_create_weights),
    Patch(live_loading.PROCESS_WEIGHTS, live_loading.wrap_process_weights),
    Patch(
        live_loading.SKIP_WEIGHT,
        live_loading.wrap_should_skip_weight,
        live_loading.SKIP_WEIGHT_USERS,
    ),
    Patch(
        live_loading.PROCESS_MODEL,
        live_loading.wrap_process_model,
        live_loading.PROCESS_MODEL_USERS,
    ),
    Patch(live_loading.SELECT_FORWARD, live_loading.wrap_select_forward),
    Patch(live_loading.LOAD_MODEL, live_loading.wrap_load_model),
    Patch(kv_growth.GET_CONFIGS, kv_growth.wrap_get_kv_cache_configs, kv_growth.CONFIG_USERS),
    Patch(
        kv_growth.SCHEDULER_CONFIG,
        kv_growth.wrap_scheduler_kv_cache_config,
        kv_growth.CONFIG_USERS,
    ),
    Patch(kv_growth.INITIALIZE, kv_growth.wrap_initialize_from_config),
    Patch(kv_memory.ALLOCATE, kv_memory.wrap_allocate_kv_cache, kv_memory.ALLOCATE_USERS),
    Patch(entry.BUILD_AND_SERVE, entry.wrap_build_and_serve),
    Patch(batch_slots.PREPARE_INPUTS, batch_slots.wrap_prepare_inputs),
    Patch(batch_slots.DUMMY_RUN, batch_slots.wrap_dummy_run),
    Patch(batch_slots.V2_ADD_REQUESTS, batch_slots.wrap_v2_add_requests),
    Patch(batch_slots.V2_PREPARE_INPUTS, batch_slots.wrap_v2_prepare_inputs),
    Patch(batch_slots.V2_DUMMY_RUN, batch_slots.wrap_dummy_run),
    Patch(request_scoring.PROMPT_LOGPROBS, request_scoring.wrap_prompt_logprobs),
    Patch(request_scoring.V2_ADD_REQUEST, request_scoring.wrap_v2_add_request),
    Patch(request_scoring.V2_PROMPT_LOGPROBS, request_scoring.wrap_v2_prompt_logprobs),
    Patch(admission.CHECK_MODEL, admission.wrap_check_model),
    Patch(admission.IS_MODEL_SUPPORTED, admission.wrap_is_model_supported),
    Patch(admission.MAYBE_GET_ADAPTERS, admission.wrap_maybe_get_adapters),
    Patch(admission.MODEL_NAME, admission.wrap_model_name),
    Patch(admission.CREATE_RESPONSES, admission.wrap_create_responses),
    Patch(admission.ADD_REQUEST, admission.wrap_add_request),
    Patch(user_traffic.PROCESS_OUTPUTS, user_traffic.wrap_process_outputs),
    Patch(admitted_sequences.ADD_REQUEST, admitted_sequences.wrap_output_add_request),
    Patch(request_meter.FINISHED, request_meter.wrap_finished),
    Patch(request_spans.DO_TRACING, request_spans.wrap_do_tracing),
    Patch(request_spans.INSTRUMENT, request_spans.wrap_instrument, request_spans.INSTRUMENT_USERS),
    Patch(cache_salt.FROM_ENGINE_CORE_REQUEST, cache_salt.wrap_from_engine_core_request),
)

ADDITIONS: tuple[tuple[str, str, str], ...] = (
    ("vllm.v1.engine.core", "EngineCore", "liveprune.patches.live_core"),
    ("vllm.v1.worker.worker_base", "WorkerBase", "liveprune.patches.live_operations"),
)
"""Classes of vLLM that get a method ``liveprune``, and the modules that define it."""

_MARK = "__liveprune_patch__"


def register() -> None:
    """Check this vLLM and apply all patches; a second call does nothing.

    Raises:
        IncompatibleEnvironmentError: unknown vLLM version, or a patched function has changed.
    """
    import vllm

    end_with_parent()
    check_version(vllm.__version__)
    for patch in PATCHES:
        check_seam(patch.seam)
    for patch in PATCHES:
        _apply(patch)
    for module, name, ours in ADDITIONS:
        owner = getattr(importlib.import_module(module), name)
        owner.liveprune = importlib.import_module(ours).liveprune


def _apply(patch: Patch) -> None:
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
