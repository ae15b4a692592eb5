"""vLLM's whole front end (routes, serving classes, AsyncLLM) over an engine core that is not there.

Only the process behind AsyncLLM is replaced: it records what reaches it and answers as it is told.
"""

from __future__ import annotations

import asyncio
import functools
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from liveprune.patches import (
    admission,
    admitted_sequences,
    request_meter,
    request_spans,
    user_traffic,
)
from liveprune.patches.admission import Admission
from liveprune.patches.compat import Seam
from liveprune.patches.live_types import Served
from liveprune.server.measuring_middleware import MeasuringMiddleware
from liveprune.server.variant_middleware import VariantMiddleware

NAME = "tiny"
ALIAS_TOO = "tiny-alias"
FULL = Served(f"{NAME}:full", 0, None)
E4 = Served(f"{NAME}:e4", 3, f"{NAME}:e4@00ff")
E2 = Served(f"{NAME}:e2", 5, f"{NAME}:e2@00aa")
WRAPS: tuple[tuple[Seam, Callable[..., Any]], ...] = (
    (admission.CHECK_MODEL, admission.wrap_check_model),
    (admission.IS_MODEL_SUPPORTED, admission.wrap_is_model_supported),
    (admission.MAYBE_GET_ADAPTERS, admission.wrap_maybe_get_adapters),
    (admission.MODEL_NAME, admission.wrap_model_name),
    (admission.CREATE_RESPONSES, admission.wrap_create_responses),
    (admission.ADD_REQUEST, admission.wrap_add_request),
    (admitted_sequences.ADD_REQUEST, admitted_sequences.wrap_output_add_request),
    (user_traffic.PROCESS_OUTPUTS, user_traffic.wrap_process_outputs),
    (request_meter.FINISHED, request_meter.wrap_finished),
    (request_spans.DO_TRACING, request_spans.wrap_do_tracing),
)
_MARK = "__liveprune_patch__"


class FakeDirectory:
    """Three live variants; counts pins."""

    def __init__(self, alias: Served = E4) -> None:
        self.live = {served.name: served for served in (FULL, E4, E2)}
        self.alias = alias
        self.pins: Counter[str] = Counter()
        self.unpins: Counter[str] = Counter()

    def resolve(self, model: str, request: Admission) -> Served | None:
        return self.live.get(self.alias.name if model in (NAME, ALIAS_TOO) else model)

    def counts(self, model: str) -> bool:
        return model in (NAME, ALIAS_TOO)

    def pin(self, served: Served) -> None:
        self.pins[served.name] += 1

    def unpin(self, served: Served) -> None:
        self.unpins[served.name] += 1

    def cards(self) -> list[dict[str, Any]]:
        return [{"id": name, "parent": NAME, "liveprune": {"plan": name}} for name in self.live]

    @property
    def held(self) -> Counter[str]:
        return self.pins - self.unpins


class FakeCore:
    """Stands in for vLLM's client of the engine process."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.arrivals: asyncio.Queue[Any] = asyncio.Queue()
        self.aborts: asyncio.Queue[list[str]] = asyncio.Queue()
        self.answers = True
        """False: requests wait until ``answer``."""
        self.steps: list[list[int]] = [[40]]
        """Tokens of each step of an answer."""
        self.finish = "length"
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0]
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()

    @property
    def carried(self) -> list[Any]:
        """The extra arguments of every request, in order."""
        return [request.sampling_params.extra_args for request in self.requests]

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate", "embed")

    async def get_output_async(self) -> Any:
        return await self._outputs.get()

    async def add_request_async(self, request: Any) -> None:
        self.requests.append(request)
        self.arrivals.put_nowait(request)
        if self.answers:
            self.answer(request)

    def answer(self, request: Any) -> None:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

        sampling = request.sampling_params
        # For beams, which look at the likeliest tokens, and for scoring.
        logprobs = _logprobs() if sampling.logprobs or sampling.logprob_token_ids else None
        for i, tokens in enumerate(self.steps):
            end = FinishReason[self.finish.upper()] if i + 1 == len(self.steps) else None
            output = EngineCoreOutput(
                request.request_id, list(tokens), new_logprobs=logprobs, finish_reason=end
            )
            self._outputs.put_nowait(EngineCoreOutputs(outputs=[output]))

    async def abort_requests_async(self, ids: list[str]) -> None:
        self.aborts.put_nowait(ids)

    def shutdown(self, timeout: float | None = None) -> None: ...


def _logprobs() -> Any:
    import numpy as np
    from vllm.v1.outputs import LogprobsLists

    ids = np.array([[40, 40, 41, 42, 43]])
    return LogprobsLists(ids, np.log(np.full(ids.shape, 0.2)), np.array([0]))


@dataclass
class FrontEnd:
    """A running front end."""

    app: Any
    """With our middleware around it."""
    state: Any
    llm: Any
    core: FakeCore
    client: httpx.AsyncClient

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.client.post(path, json=body)


def patch_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apply this module's wraps, unless a plugin that was loaded before has done so."""
    for seam, wrap in WRAPS:
        original = seam.resolve()
        if not hasattr(original, _MARK):
            replacement = functools.wraps(original)(wrap(original))
            setattr(replacement, _MARK, True)
            monkeypatch.setattr(f"{seam.module}.{seam.qualname}", replacement)


@asynccontextmanager
async def front_end(
    model: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, task: str = "generate"
) -> AsyncIterator[FrontEnd]:
    """Start vLLM's API application in this event loop."""
    core = FakeCore()
    # The plugin would stay in this process for other tests.
    monkeypatch.setattr("vllm.plugins.plugins_loaded", True)
    monkeypatch.setattr(
        "vllm.v1.engine.core_client.EngineCoreClient.make_async_mp_client", lambda **_: core
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own
        app, llm = await _application(model, flags, task)
    transport = httpx.ASGITransport(VariantMiddleware(MeasuringMiddleware(app)))
    async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as client:
        try:
            yield FrontEnd(transport.app, app.state, llm, core, client)
        finally:
            llm.shutdown()


async def _application(model: Path, flags: tuple[str, ...], task: str) -> tuple[Any, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = ["--model", str(model), "--served-model-name", NAME, ALIAS_TOO]
    arguments += ["--max-model-len", "64", "--dtype", "float32", "--disable-log-stats", *flags]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
    app = build_app(args, (task,), llm.model_config)
    await init_app_state(llm, app.state, args, (task,))
    return app, llm


async def call_app(app: Any, path: str, body: bytes, gone: asyncio.Event) -> None:
    """POST as uvicorn does, for a client that reads until ``gone`` and then disconnects."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None: ...

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"host", b"vllm")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
