"""The engine that a search runs on: in this process, in actors of Ray, or a running server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from liveprune.pruning.errors import DataError, EngineError, IncompatibleEnvironmentError
from liveprune.pruning.evaluation.engine import AnswerScores, Engine
from liveprune.pruning.model_spec import ModelSpec
from liveprune.server.engine_description import EngineDescription
from liveprune.server.ray_cluster import import_ray, ray_cluster
from liveprune.server.ray_pool import ray_pool
from liveprune.server.search_options import SearchOptions

DTYPES = ("auto", "bfloat16", "float16", "float32")


@contextmanager
def search_engine(
    options: SearchOptions, spec: ModelSpec, kept: Sequence[int], longest: int
) -> Iterator[Engine]:
    """The engine that the options name; it starts, or is called, when it is first asked.

    So all that a search refuses is refused before, and one that is complete starts none. Only a
    Ray cluster with an address is connected to at once: a wrong address is to be known early.

    Args:
        options: of the search.
        spec: of its model.
        kept: experts that a candidate keeps, by layer.
        longest: tokens of the longest text.

    Raises:
        DataError: no such engine or dtype, or options that contradict each other.
        IncompatibleEnvironmentError: actors are asked for and Ray, or its cluster, is not there.
    """
    name = engine_name(options)
    if options.ray_address is not None and options.actors is None:
        raise DataError("--ray-address: found without --actors, expected their number")
    if options.actors is not None and name == "server":
        raise DataError(
            "--actors: found with the URL of a server, expected --engine vllm or transformers: a "
            "server has its own engine"
        )
    with ExitStack() as stack:
        if options.actors is not None:
            import_ray()
        if options.ray_address is not None:
            stack.enter_context(ray_cluster(options.ray_address))
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
    if engine_name(options) == "server":
        from liveprune.server.admin_key import client_key, default_state_folder
        from liveprune.server.server_engine import ServerEngine

        key, source = client_key(options.admin_key_file, default_state_folder())
        with ServerEngine(options.engine, key, options.model, key_source=source) as server:
            yield server
        return
    described = EngineDescription(
        kind=options.engine,
        model=options.model,
        dtype=_dtype(options),
        longest=longest,
        candidates=options.settings.children,
        kept=tuple(kept),
        merges=options.settings.merge,
        router_maps=options.settings.merge or not spec.router.renormalise,
    )
    if options.actors is None:
        with described.started() as engine:
            yield engine
    else:
        with ray_pool(described, options.actors, options.ray_address) as pool:
            yield pool


def _dtype(options: SearchOptions) -> str:
    """By default the checkpoint's own, as vLLM does; the reference, too, or they would differ."""
    if options.dtype != "auto":
        return options.dtype
    config = ModelSpec.from_path(options.model).config
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return stated if stated in DTYPES else "float32"
