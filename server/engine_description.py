"""What an engine of a search is made of: said in one process, started in that one or another."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from liveprune.pruning.checkpoint.layer_tensors import layer_tensors
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint
from liveprune.pruning.evaluation.engine import Engine
from liveprune.pruning.model_spec import ModelSpec

BLOCK_SIZE = 32
SEQUENCES = 32
"""Texts that are generated at once."""
SHARE = 0.5
"""Of the memory that the full model leaves: what merged candidates may take."""


@dataclass(frozen=True)
class EngineDescription:
    """An engine that loads the model itself. Can be pickled; memory is looked at where it starts.

    What it computes hangs on ``kind``, ``model``, ``dtype`` and ``options`` alone.
    """

    kind: str
    """``vllm`` or ``transformers``."""
    model: Path
    """Checkpoint folder, the same path in every process."""
    dtype: str
    """One of ``transformers_engine.DTYPES``."""
    longest: int
    """Tokens of the longest text."""
    candidates: int = 16
    """Plans live at once, at most; fewer where their merged experts do not fit in memory."""
    kept: tuple[int, ...] = ()
    """Experts that a candidate keeps, by layer with experts."""
    merges: bool = False
    """Candidates merge experts: each takes memory."""
    router_maps: bool = False
    """Candidates have router maps: each takes spare rows."""
    neighbours: int = 1
    """Engines that share the machine's memory, this one included; a GPU is not shared."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ``vllm.LLM``, e.g. ``tensor_parallel_size``."""

    @property
    def gpus(self) -> int:
        """GPUs that it uses where there are any: the reference engine runs on the CPU."""
        return int(self.options.get("tensor_parallel_size", 1)) if self.kind == "vllm" else 0

    @contextmanager
    def started(self) -> Iterator[Engine]:
        """Load the model in this process; stopped at the end.

        Raises:
            EngineError: vLLM did not start.
            LiveprunError: the model cannot be loaded, or its candidates cannot be run.
        """
        if self.kind == "transformers":
            from liveprune.pruning.evaluation.transformers_engine import TransformersEngine

            yield TransformersEngine(self.model, dtype=self.dtype)
            return
        # Said before vLLM is imported: its notes on every start would bury the search's own words.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from liveprune.patches.scoring_engine import ScoringEngine

        candidates = self.fitting_candidates()
        engine = ScoringEngine(
            self.model,
            candidates=candidates,
            spare_rows=candidates * max(self.kept) if self.router_maps else 0,
            max_length=self.longest,
            **self._vllm_options(),
        )
        try:
            yield engine
        finally:
            engine.close()

    def fitting_candidates(self) -> int:
        """How many are live at once: as asked, or fewer where their merged experts take much."""
        if not self.merges:
            return self.candidates
        blocks = layer_tensors(read_checkpoint(self.model).tensors, ModelSpec.from_path(self.model))
        one = sum(
            block.expert_bytes / block.layer.experts * count
            for block, count in zip(blocks, self.kept, strict=True)
        )
        room = SHARE * (_free_memory(self.neighbours) - _model_bytes(self.model))
        return max(1, min(self.candidates, int(room // one)))

    def _vllm_options(self) -> dict[str, Any]:
        """Sizes for an engine that scores: little KV cache, passes of a few thousand tokens."""
        return {
            "dtype": self.dtype,
            "block_size": BLOCK_SIZE,
            "max_num_batched_tokens": max(4096, self.longest),
            "max_num_seqs": SEQUENCES,
            "num_gpu_blocks_override": 2 * SEQUENCES * math.ceil(self.longest / BLOCK_SIZE),
            # Inside one of Ray's actors vLLM might otherwise take workers of Ray's for its own.
            "distributed_executor_backend": "mp" if self.gpus > 1 else None,
            **self.options,
        }


def _free_memory(neighbours: int) -> int:
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return int(free)
    return int(psutil.virtual_memory().available) // neighbours


def _model_bytes(model: Path) -> int:
    return sum(entry.size for entry in read_checkpoint(model).tensors.values())
