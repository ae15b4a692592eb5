"""Start vLLM's own OpenAI server in this process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from liveprune.patches.compat import Seam
from liveprune.patches.live_config import live_config, why_off
from liveprune.patches.live_engine import VLLMLiveEngine
from liveprune.pruning.errors import EngineError

BUILD_AND_SERVE = Seam(
    "vllm.entrypoints.launchers.api_server.entry",
    "build_and_serve",
    ("engine_client", "listen_address", "sock", "args", "peer_loads", "uvicorn_kwargs"),
)

Stop = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Front:
    """vLLM's server just before its first request."""

    engine: VLLMLiveEngine | None
    """None where live variants are off."""
    reason: str
    """Why they are off; empty if they were not asked for."""
    names: list[str]
    """Served model names."""
    address: str
    """Where it listens, e.g. ``http://0.0.0.0:8000``."""


OnFront = Callable[[Front], Awaitable[Stop]]
"""Called before the first request; what it returns is called after the last one."""

_on_front: OnFront | None = None
_engine_died = False
"""The server ended because its engine did: vLLM itself ends with status 0 then."""


def run_vllm_server(arguments: Sequence[str], on_front: OnFront | None = None) -> None:
    """Run ``vllm serve`` with ``arguments``; returns when the server has stopped.

    Raises:
        EngineError: the engine died, and the server with it.
        SystemExit: as vLLM does, e.g. on bad flags.
    """
    global _on_front  # noqa: PLW0603 - one server in a process
    from vllm.entrypoints.cli.main import main

    _on_front = on_front
    # vLLM parses sys.argv itself, and looks at it in several places.
    sys.argv = ["vllm", "serve", *arguments]
    main()
    if _engine_died:
        raise EngineError("the engine died (its log is above); start the server again")


def wrap_build_and_serve(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``on_front`` in between the engine's start and the first request."""

    async def build_and_serve(
        engine_client: Any, listen_address: str, sock: Any, args: Any, *rest: Any, **kwargs: Any
    ) -> Any:
        global _engine_died  # noqa: PLW0603 - as above
        stop = None
        if _on_front is not None:
            stop = await _on_front(_front(engine_client, listen_address, args))
        stopped = _note_shutdown(engine_client)
        try:
            return await original(engine_client, listen_address, sock, args, *rest, **kwargs)
        finally:
            _engine_died = bool(engine_client.errored) and not stopped.is_set()
            if stop is not None:
                await stop()

    return build_and_serve


def _note_shutdown(engine_client: Any) -> threading.Event:
    """Set when vLLM shuts the engine down, after which it counts as errored, too."""
    stopped, shutdown = threading.Event(), engine_client.shutdown

    def noting(*args: Any, **kwargs: Any) -> Any:
        stopped.set()
        return shutdown(*args, **kwargs)

    engine_client.shutdown = noting
    return stopped


def _front(engine_client: Any, listen_address: str, args: Any) -> Front:
    vllm_config = engine_client.vllm_config
    config = live_config(vllm_config)
    return Front(
        engine=VLLMLiveEngine(engine_client, config) if config is not None else None,
        reason=why_off(vllm_config),
        names=list(args.served_model_name or [args.model]),
        address=listen_address,
    )
