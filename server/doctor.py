"""``liveprune doctor``: what is wrong with this environment, and how to mend it."""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    status: Status
    found: str
    mend: str = ""


def diagnose() -> list[Finding]:
    """Run all checks; a check that itself fails is reported as an error."""
    findings = []
    for check in CHECKS:
        try:
            findings.append(check())
        except Exception as error:  # noqa: BLE001 - a doctor must survive any broken import
            name = check.__name__.removeprefix("check_")
            findings.append(Finding(name, "error", f"{type(error).__name__}: {error}"))
    return findings


def check_python() -> Finding:
    """Python 3.11 or newer."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036 - the environment may not be the one pip checked
        return Finding("python", "error", version, "Install Python 3.11 or newer.")
    return Finding("python", "ok", version)


def check_vllm_version() -> Finding:
    """VLLM's metadata is there and says a supported version."""
    from liveprune.patches.compat import SUPPORTED

    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        found = "no distribution named vllm"
        if importlib.util.find_spec("vllm"):
            found += " (its code is there: the CPU build without its metadata wheel)"
        return Finding("vllm", "error", found, "Run `make setup` (CPU) or install vllm==0.32.*.")
    if not version.startswith(SUPPORTED):
        return Finding("vllm", "error", version, f"Install vllm=={SUPPORTED}*.")
    return Finding("vllm", "ok", version)


def check_torchvision() -> Finding:
    """A torchvision of another build than torch breaks imports of transformers and vLLM."""
    torch_build = metadata.version("torch").partition("+")[2] or "default"
    problems = []
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - a broken binary raises what it likes
            problems.append(f"{name}: {type(error).__name__}: {str(error)[:80]}")
    if problems:
        mend = (
            "Uninstall torchvision, torchaudio and torchcodec, then run `make setup`, which puts "
            "metadata-only wheels in their place."
        )
        return Finding("media packages", "error", f"torch {torch_build}; {problems}", mend)
    return Finding("media packages", "ok", f"torch {torch_build}; none broken")


def check_transformers() -> Finding:
    """The model classes import, and the version is one that vLLM 0.32 accepts."""
    version = metadata.version("transformers")
    importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    major, minor = (int(part) for part in version.split(".")[:2])
    if not (5, 16) <= (major, minor) < (5, 20):
        return Finding("transformers", "error", version, "Install transformers>=5.16.1,<5.20.")
    return Finding("transformers", "ok", version)


def check_plugin() -> Finding:
    """VLLM finds Liveprune's plugin, and the patches fit this vLLM."""
    names = [entry.name for entry in metadata.entry_points(group="vllm.general_plugins")]
    if "liveprune" not in names:
        mend = "Install Liveprune with pip: an import path alone does not register the plugin."
        return Finding("plugin", "error", f"vLLM sees the plugins {names}", mend)
    from liveprune.patches.compat import check_seam
    from liveprune.patches.plugin import PATCHES
    from liveprune.pruning.errors import IncompatibleEnvironmentError
    from liveprune.server.serve import check_plugin_enabled

    try:
        check_plugin_enabled()
    except IncompatibleEnvironmentError as error:
        return Finding("plugin", "error", str(error), "Unset VLLM_PLUGINS or add liveprune.")
    for patch in PATCHES:
        check_seam(patch.seam)
    return Finding("plugin", "ok", f"registered; {len(PATCHES)} patched functions as expected")


def check_threads() -> Finding:
    """Small machines: one OpenMP thread per engine uses far less CPU for the same work."""
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    if not _is_cpu_build() or cores > 4 or threads == "1":
        return Finding("threads", "ok", f"{cores} cores, OMP_NUM_THREADS={threads}")
    mend = "export OMP_NUM_THREADS=1 (measured: up to ten times less CPU on two cores)"
    return Finding("threads", "warning", f"{cores} cores, OMP_NUM_THREADS={threads}", mend)


def check_kv_cache() -> Finding:
    """The CPU build takes its KV cache size from the environment."""
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if not _is_cpu_build() or space is not None:
        return Finding("kv cache", "ok", f"VLLM_CPU_KVCACHE_SPACE={space}")
    mend = "export VLLM_CPU_KVCACHE_SPACE=1 (GiB), or vLLM takes a large share of memory"
    return Finding("kv cache", "warning", "VLLM_CPU_KVCACHE_SPACE is not set", mend)


def check_bytecode() -> Finding:
    """Without byte code every start compiles thousands of modules."""
    spec = importlib.util.find_spec("vllm")
    cached = spec.cached if spec is not None else None
    if os.environ.get("PYTHONDONTWRITEBYTECODE") and cached and not os.path.exists(cached):  # noqa: PTH110
        mend = "python -m compileall -q -j 0 on site-packages (`make setup` does it)"
        return Finding("byte code", "warning", "vllm is not byte-compiled", mend)
    return Finding("byte code", "ok", "present or writable")


def check_ray() -> Finding:
    """Only searches over many engines need it."""
    try:
        return Finding("ray", "ok", metadata.version("ray"))
    except metadata.PackageNotFoundError:
        found = "not installed; prune --actors needs it: pip install 'liveprune[ray]'"
        return Finding("ray", "ok", found)


def _is_cpu_build() -> bool:
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return importlib.util.find_spec("vllm") is not None


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_vllm_version,
    check_torchvision,
    check_transformers,
    check_plugin,
    check_threads,
    check_kv_cache,
    check_bytecode,
    check_ray,
)


def worst(findings: list[Finding]) -> Status:
    """The most severe status."""
    order: tuple[Status, ...] = ("ok", "warning", "error")
    return max((f.status for f in findings), key=order.index, default="ok")
