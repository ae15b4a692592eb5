"""``liveprune serve``: vLLM's own OpenAI server, with the checkpoint checked first."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from liveprune.patches.entry import Front, run_vllm_server
from liveprune.patches.live_config import LiveConfig
from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.checkpoint.verify import verify_checkpoint
from liveprune.pruning.errors import (
    ArchitectureError,
    IncompatibleEnvironmentError,
    VariantError,
)
from liveprune.pruning.model_spec import BLOCK_KEY, ModelSpec
from liveprune.pruning.plan_io import CHECKPOINT_PLAN
from liveprune.server.live import LiveServer
from liveprune.server.live_options import (
    LiveOptions,
    make_config,
    model_state,
    note_variants,
    read_variants,
)
from liveprune.server.model_path import check_not_a_path, local_model
from liveprune.server.rebuild_thread import beside
from liveprune.server.state_folder import StateFolder

MIDDLEWARE = (
    # The last is the outermost: it opens the admission that the first one looks at.
    "liveprune.server.prompt_middleware.PromptMiddleware",
    "liveprune.server.openai_errors.OpenAIErrorMiddleware",
    "liveprune.server.measuring_middleware.MeasuringMiddleware",
    "liveprune.server.variant_middleware.VariantMiddleware",
)
ADDITIONAL_CONFIG = "--additional-config"
SCHEDULING = "--scheduling-policy"
"""Candidates of a search run below user traffic, which takes ``priority``. Requests that state no
priority are served as by vLLM's default, first come first served."""


def serve(model: str, flags: Sequence[str], options: LiveOptions | None) -> None:
    """Serve until stopped; ``options``: None turns live variants off.

    Raises:
        LiveprunError: model, plans, keys or state folder are unusable.
        SystemExit: as vLLM does, e.g. on bad flags.
    """
    live = None if options is None else prepare_live(model, flags, options)
    if live is None:
        run_vllm_server(vllm_arguments(model, flags))
        return
    log_to_stderr()
    server, config = live
    base = Path(config.checkpoint)
    try:
        with server.restarting() as checkpoint:
            if checkpoint == base:
                arguments = vllm_arguments(model, flags, config)
            else:  # rebuild mode: another checkpoint under the same name
                named = () if _known(flags).served_model_name else ("--served-model-name", model)
                arguments = vllm_arguments(str(checkpoint), [*flags, *named])
            with _beside_several(server, model, flags):
                run_vllm_server(arguments, server.on_front)
    finally:
        server.close()


def _beside_several(
    server: LiveServer, model: str, flags: Sequence[str]
) -> AbstractContextManager[None]:
    """Several API servers are processes of their own: the admin API then runs beside them."""
    known = _known(flags)
    if known.api_server_count <= 1 and known.data_parallel_size <= 1:
        return nullcontext()
    names = known.served_model_name or [model]
    address = f"http://{known.host}:{known.port}"
    front = Front(None, "several API servers or engines", names, address)
    return beside(lambda: server.on_front(front))


def log_to_stderr() -> None:
    """Show Liveprune's own log; vLLM sets up only its own."""
    logger = logging.getLogger("liveprune")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("liveprune: %(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def prepare_live(
    model: str, flags: Sequence[str], options: LiveOptions
) -> tuple[LiveServer, LiveConfig] | None:
    """Everything that can be known to fail, before vLLM starts.

    Returns:
        None where live variants cannot work: an unknown family, another front door than vLLM's
        own HTTP server.

    Raises:
        LiveprunError: plans do not fit, keys or state folder are unusable.
        OSError: the admin port is taken.
    """
    base = local_model(model)
    try:
        spec = ModelSpec.from_path(base)
    except ArchitectureError:
        if options.insists:
            raise
        return None
    door = _other_door(flags)
    if door is not None:
        if options.insists:
            raise IncompatibleEnvironmentError(f"live variants cannot work with {door}")
        return None
    plans = read_variants(options.variants, spec)
    folder = StateFolder(
        model_state(options.state, base),
        base,
        model=fingerprint_model(base),
        store_url=options.store,
        files=options.store_files,
        replica=options.replica,
        quota=options.store_quota,
        keep_jobs=options.keep_jobs,
    )
    try:
        resident = note_variants(folder, plans, options.resident)
        digest = folder.state.variants.get(resident) if resident is not None else None
        plan = None if digest is None else folder.store.plans.path(digest)
        config = make_config(base, spec, options, plan)
        return LiveServer(base, folder, options, resident, _known(flags).api_key), config
    except BaseException:
        folder.close()
        raise


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


def vllm_arguments(model: str, flags: Sequence[str], live: LiveConfig | None = None) -> list[str]:
    """The arguments for ``vllm serve``: everything passes through; ours comes on top.

    Raises:
        VariantError: the user's own ``--additional-config`` is not a JSON object.
    """
    ours = [part for name in MIDDLEWARE for part in ("--middleware", name)]
    if live is None:
        return [model, *flags, *ours]
    rest, config = _take_config(flags)
    config |= live.to_additional_config()
    given = {flag.partition("=")[0].replace("_", "-") for flag in flags}
    scheduling = [] if SCHEDULING in given else [SCHEDULING, "priority"]
    return [model, *rest, *ours, *scheduling, ADDITIONAL_CONFIG, json.dumps(config)]


def _other_door(flags: Sequence[str]) -> str | None:
    """What would let requests in past the middleware that chooses their variants."""
    if "--grpc" in flags:
        return "--grpc"
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        return "VLLM_USE_RUST_FRONTEND"
    return None


def _known(flags: Sequence[str]) -> argparse.Namespace:
    """Those of vLLM's flags that matter to us, whichever way they are spelled."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--api-server-count", "--data-parallel-size"):
        parser.add_argument(name, type=int, default=1)
    parser.add_argument("--served-model-name", nargs="*")
    parser.add_argument("--api-key", nargs="*", action="extend", default=[])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_known_args(list(flags))[0]


def _take_config(flags: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split the user's own additional config from the other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(ADDITIONAL_CONFIG, default="{}")
    known, rest = parser.parse_known_args(list(flags))
    try:
        config = json.loads(known.additional_config)
    except ValueError as error:
        raise VariantError(f"{ADDITIONAL_CONFIG}: not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise VariantError(f"{ADDITIONAL_CONFIG}: found {config!r}, expected a JSON object")
    return rest, config


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
