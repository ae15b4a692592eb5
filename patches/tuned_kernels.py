"""Whether vLLM ships a tuned kernel configuration for a number of experts."""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from liveprune.pruning.model_spec import ModelSpec

CONFIGS = Path("model_executor", "layers", "fused_moe", "configs")
_NAME = re.compile(r"E=(\d+),N=(\d+),device_name=([^,]+?)(,.*)?\.json")


def untuned(spec: ModelSpec, counts: Collection[int]) -> str | None:
    """Say which of the counts have no tuned kernel on this GPU though the full model has one.

    On a machine without a GPU: on none of the GPUs that have one for the full model. A checkpoint
    of that many experts runs, by vLLM's default configuration.

    Args:
        spec: of the base model.
        counts: experts per layer that a checkpoint is to have.
    """
    names = config_names()
    if not names:
        return None
    return compare(names, spec.expert_size, {x.experts for x in spec.layers}, counts, this_gpu())


def compare(
    names: Collection[str], size: int, full: Collection[int], counts: Collection[int], gpu: str
) -> str | None:
    """As ``untuned``, of the names of vLLM's configuration files; ``gpu`` is empty without one."""
    tuned = _devices(names, size)
    devices = set.intersection(*(tuned.get(count, set()) for count in full))
    if gpu:
        devices &= {gpu}
    lost = sorted(count for count in set(counts) - set(full) if devices - tuned.get(count, set()))
    if not lost:
        return None
    return (
        f"vLLM has a kernel tuned for the full model on {', '.join(sorted(devices))}, but not for "
        f"{', '.join(map(str, lost))} experts of size {size}: such a checkpoint runs with default "
        f"kernel settings until tuned with vLLM's benchmark_moe; live variants are not affected"
    )


def tuned_counts(names: Collection[str], size: int, gpu: str) -> frozenset[int]:
    """Numbers of experts of that size that vLLM has a tuned kernel for; ``gpu`` "" means any."""
    devices = _devices(names, size)
    return frozenset(count for count, found in devices.items() if not gpu or gpu in found)


def config_names() -> list[str]:
    """Of vLLM's configuration files; none where vLLM is not installed."""
    package = find_spec("vllm")
    if package is None or package.origin is None:
        return []
    return [path.name for path in (Path(package.origin).parent / CONFIGS).glob("E=*.json")]


def _devices(names: Collection[str], size: int) -> dict[int, set[str]]:
    """GPUs with a tuned kernel for experts of that size, unquantised, by number of experts."""
    tuned: dict[int, set[str]] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match and int(match[2]) == size and not match[4]:
            tuned.setdefault(int(match[1]), set()).add(match[3])
    return tuned


def this_gpu() -> str:
    """Name of the first GPU as vLLM's files have it; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return ""
    name = torch.cuda.get_device_name(0).replace(" ", "_")
    return "NVIDIA_H200" if "H200" in name.split("_") else name
