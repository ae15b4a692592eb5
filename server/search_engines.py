"""The engine that a search runs on: vLLM in this process, a running server, or transformers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from liveprune.pruning.checkpoint.layer_tensors import layer_tensors
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint
from liveprune.pruning.errors import DataError
from liveprune.pruning.evaluation.engine import Engine
from liveprune.pruning.model_spec import ModelSpec
from liveprune.server.search_options import SearchOptions

BLOCK_SIZE = 32
SEQUENCES = 32
"""Texts that are generated at once."""
SHARE = 0.5
"""Of the memory that the full model leaves: what merged candidates may take."""


@contextmanager
def search_engine(
    options: SearchOptions, spec: ModelSpec, kept: Sequence[int], longest: int
) -> Iterator[Engine]:
    """Start, or find, the engine that the options name.

    Args:
        options: of the search.
        spec: of its model.
        kept: experts that a candidate keeps, by layer.
        longest: tokens of the longest text.

    Raises:
        DataError: ``options.engine`` names no engine.
        LiveprunError: it cannot run this model.
    """
    if options.engine == "transformers":
        from liveprune.pruning.evaluation.transformers_engine import TransformersEngine

        dtype = "float32" if options.dtype == "auto" else options.dtype
        yield TransformersEngine(options.model, dtype=dtype)
    elif options.engine == "vllm":
        # Said before vLLM is imported: its notes on every start would bury the search's own words.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from liveprune.patches.scoring_engine import ScoringEngine

        candidates = _candidates(options, spec, kept)
        engine = ScoringEngine(
            options.model,
            candidates=candidates,
            spare_rows=candidates * max(kept)
            if options.settings.merge or not spec.router.renormalise
            else 0,
            max_length=longest,
            **vllm_options(longest, options.dtype),
        )
        try:
            yield engine
        finally:
            engine.close()
    elif options.engine.startswith(("http://", "https://")):
        from liveprune.server.admin_key import client_key, default_state_folder
        from liveprune.server.server_engine import ServerEngine

        key, _ = client_key(options.admin_key_file, default_state_folder())
        with ServerEngine(options.engine, key, options.model) as server:
            yield server
    else:
        raise DataError(
            f"--engine: found {options.engine!r}, expected vllm, transformers or the URL of a "
            f"server's admin API"
        )


def vllm_options(longest: int, dtype: str) -> dict[str, Any]:
    """Sizes for an engine that scores: little KV cache, passes of a few thousand tokens."""
    return {
        "dtype": dtype,
        "block_size": BLOCK_SIZE,
        "max_num_batched_tokens": max(4096, longest),
        "max_num_seqs": SEQUENCES,
        "num_gpu_blocks_override": 2 * SEQUENCES * math.ceil(longest / BLOCK_SIZE),
    }


def _candidates(options: SearchOptions, spec: ModelSpec, kept: Sequence[int]) -> int:
    """How many are live at once: a generation, or fewer where their merged experts take much."""
    wanted = options.settings.children
    if not options.settings.merge:
        return wanted
    blocks = layer_tensors(read_checkpoint(options.model).tensors, spec)
    one = sum(
        block.expert_bytes / block.layer.experts * count
        for block, count in zip(blocks, kept, strict=True)
    )
    room = SHARE * (_free_memory() - _model_bytes(options.model))
    return max(1, min(wanted, int(room // one)))


def _free_memory() -> int:
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return int(free)
    return int(psutil.virtual_memory().available)


def _model_bytes(model: Path) -> int:
    return sum(entry.size for entry in read_checkpoint(model).tensors.values())
