"""What this machine is, and how fast one thread reads and multiplies: the floors' denominators."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

READ_BYTES = 512 << 20
"""Far above any cache."""
ROWS = 512


def describe_machine() -> dict[str, object]:
    """For the JSON results: processor, memory, versions."""
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    versions = {
        name: importlib.metadata.version(name)
        for name in ("liveprune", "vllm", "torch", "transformers")
    }
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_bytes": pages,
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        **versions,
    }


def probe(hidden: int, intermediate: int, experts: int, dtype: str) -> dict[str, float]:
    """The best of three, in one thread.

    Returns:
        ``read``: bytes a second; ``matmul`` and ``experts``: multiply-adds a second in ``dtype``,
        of a large square product and of vLLM's expert kernel on 512 tokens, top-2.
    """
    import torch
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    kind: torch.dtype = getattr(torch, dtype)
    matrix, vector = torch.ones(READ_BYTES // 4 // 4096, 4096), torch.ones(4096)
    read = READ_BYTES / min(_best(matrix.sum), _best(lambda: matrix @ vector))
    side = 2048
    left, right = (torch.randn(side, side).to(kind) for _ in range(2))
    matmul = side**3 / _best(lambda: left @ right)
    w13 = cpu_prepack_moe_weight(torch.randn(experts, 2 * intermediate, hidden).to(kind), "vec")
    w2 = cpu_prepack_moe_weight(torch.randn(experts, hidden, intermediate).to(kind), "vec")
    tokens = torch.randn(ROWS, hidden).to(kind)
    out = torch.empty_like(tokens)
    ids = torch.rand(ROWS, experts).topk(2).indices.to(torch.int32)
    weights = torch.full((ROWS, 2), 0.5)
    seconds = _best(
        lambda: cpu_fused_moe(out, tokens, w13, w2, None, None, weights, ids, "silu", "vec")
    )
    return {
        "read": read,
        "matmul": matmul,
        "experts": ROWS * 2 * 3 * hidden * intermediate / seconds,
    }


def _best(run: Callable[[], object]) -> float:
    """CPU seconds, as the engines are measured."""
    taken = []
    for _ in range(3):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)
