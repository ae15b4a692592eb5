"""The engine that a search runs on: vLLM in this process, a running server, or transformers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from liveprune.pruning.checkpoint.layer_tensors import layer_tensors
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint
from liveprune.pruning.errors import DataError, EngineError, IncompatibleEnvironmentError
from liveprune.pruning.evaluation.engine import AnswerScores, Engine
from liveprune.pruning.model_spec import ModelSpec
from liveprune.server.search_options import SearchOptions

BLOCK_SIZE = 32
SEQUENCES = 32
"""Texts that are generated at once."""
SHARE = 0.5
"""Of the memory that the full model leaves: what merged candidates may take."""
DTYPES = ("auto", "bfloat16", "float16", "float32")


@contextmanager
def search_engine(
    options: SearchOptions, spec: ModelSpec, kept: Sequence[int], longest: int
) -> Iterator[Engine]:
    """The engine that the options name; it starts, or is called, when it is first asked.

    So all that a search refuses is refused before, and one that is complete starts none.

    Args:
        options: of the search.
        spec: of its model.
        kept: experts that a candidate keeps, by layer.
        longest: tokens of the longest text.

    Raises:
        DataError: no such engine or dtype.
    """
    engine_name(options)
    with ExitStack() as stack:
        yield _Waiting(lambda: stack.enter_context(_started(options, spec, kept, longest)))


def engine_name(options: SearchOptions) -> str:
    """What computes, and in which dtype.

    Raises:
        DataError: the options name no such engine, or no such dtype.
    """
    if options.dtype not in DTYPES:
        raise DataError(f"--dtype: found {options.dtype!r}, expected one of {', '.join(DTYPES)}")
    if options.engine.startswith(("http://", "https://")):
        return "server"
    if options.engine not in ("vllm", "transformers"):
        raise DataError(
            f"--engine: found {options.engine!r}, expected vllm, transformers or the URL of a "
            f"server's admin API"
        )
    return f"{options.engine}, {_dtype(options)}"


class _Waiting:
    """An engine that is not there yet."""

    def __init__(self, start: Callable[[], Engine]) -> None:
        self._start = start
        self._engine: Engine | None = None

    def score(self, *arguments: Any, **options: Any) -> list[AnswerScores]:
        return self._started().score(*arguments, **options)

    def generate(self, *arguments: Any, **options: Any) -> list[list[tuple[int, ...]]]:
        return self._started().generate(*arguments, **options)

    def _started(self) -> Engine:
        if self._engine is None:
            try:
                self._engine = self._start()
            except EngineError as error:
                # No candidate is to blame: the search must not go on with the next one.
                raise IncompatibleEnvironmentError(str(error)) from error
        return self._engine


@contextmanager
def _started(
    options: SearchOptions, spec: ModelSpec, kept: Sequence[int], longest: int
) -> Iterator[Engine]:
    if options.engine == "transformers":
        from liveprune.pruning.evaluation.transformers_engine import TransformersEngine

        yield TransformersEngine(options.model, dtype=_dtype(options))
    elif options.engine == "vllm":
        # Said before vLLM is imported: its notes on every start would bury the search's own words.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from liveprune.patches.scoring_engine import ScoringEngine

        candidates = _candidates(options, spec, kept)
        maps = options.settings.merge or not spec.router.renormalise
        engine = ScoringEngine(
            options.model,
            candidates=candidates,
            spare_rows=candidates * max(kept) if maps else 0,
            max_length=longest,
            **vllm_options(longest, _dtype(options)),
        )
        try:
            yield engine
        finally:
            engine.close()
    else:
        from liveprune.server.admin_key import client_key, default_state_folder
        from liveprune.server.server_engine import ServerEngine

        key, source = client_key(options.admin_key_file, default_state_folder())
        with ServerEngine(options.engine, key, options.model, key_source=source) as server:
            yield server


def _dtype(options: SearchOptions) -> str:
    """By default the checkpoint's own, as vLLM does; the reference, too, or they would differ."""
    if options.dtype != "auto":
        return options.dtype
    config = ModelSpec.from_path(options.model).config
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return stated if stated in DTYPES else "float32"


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
