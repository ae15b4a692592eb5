"""Which live variant answers an HTTP request: chosen by its model name, once, and pinned.

The server's middleware opens an ``Admission`` before vLLM sees the request. vLLM's own check of the
model name then resolves the name in the server's ``Directory`` and pins the variant in the same
step; the answer is named after it; the one door to the engine puts it into the sampling parameters.
Whoever moves the alias meanwhile changes nothing for a request that was admitted.

Without a directory everything is vLLM's own.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from liveprune.patches.compat import Seam
from liveprune.patches.live_types import BASE_SLOT, BASE_TAG, COUNT_KEY, EXTRA_ARG, Served
from liveprune.patches.request_meter import Meter

CHECK_MODEL = Seam(
    "vllm.entrypoints.serve.engine.serving",
    "BaseServing._check_model",
    ("self", "request"),
)
IS_MODEL_SUPPORTED = Seam(
    "vllm.entrypoints.serve.engine.serving",
    "BaseServing._is_model_supported",
    ("self", "model_name"),
)
MAYBE_GET_ADAPTERS = Seam(
    "vllm.entrypoints.serve.engine.serving",
    "BaseServing._maybe_get_adapters",
    ("self", "request", "supports_default_mm_loras"),
)
MODEL_NAME = Seam(
    "vllm.entrypoints.openai.models.serving",
    "OpenAIServingModels.model_name",
    ("self", "lora_request"),
)
CREATE_RESPONSES = Seam(
    "vllm.entrypoints.openai.responses.serving",
    "OpenAIServingResponses.create_responses",
    ("self", "request", "raw_request"),
)
ADD_REQUEST = Seam(
    "vllm.v1.engine.async_llm",
    "AsyncLLM.add_request",
    (
        "self",
        "request_id",
        "prompt",
        "params",
        "arrival_time",
        "lora_request",
        "tokenization_kwargs",
        "trace_headers",
        "priority",
        "data_parallel_rank",
        "session_id",
        "prompt_text",
        "reasoning_ended",
        "reasoning_parser_kwargs",
        "kv_hints",
    ),
)


class Directory(Protocol):
    """What the server knows about the live variants. Called on the event loop; must not block."""

    def resolve(self, model: str, request: Admission) -> Served | None:
        """The variant that a model name stands for now; None if unknown or not live.

        ``model`` is the bare name, another ``--served-model-name``, or ``name:tag``. ``request``
        is being admitted: its ``scope`` and ``body`` may choose among variants, and what chose is
        noted in its ``assignment``.
        """

    def pin(self, served: Served) -> None:
        """Keep the variant live until ``unpin``: a request relies on it."""

    def unpin(self, served: Served) -> None:
        """Called once for each ``pin``."""

    def counts(self, model: str) -> bool:
        """Whether live statistics count what is asked of this model name: of the alias, all is."""

    def cards(self) -> list[dict[str, Any]]:
        """Every live variant for ``/v1/models``: ``id``, ``parent`` and ``liveprune``."""


class Admission:
    """What one HTTP request was admitted to, shared by all that work on it.

    ``served`` is None until the model name is checked. The variant stays pinned until all holds are
    released; one is there from the start.
    """

    def __init__(
        self,
        directory: Directory | None,
        served: Served | None = None,
        extra: Mapping[str, str] | None = None,
        scope: Mapping[str, Any] | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.directory = directory
        self.served = served
        self.extra = extra or {}
        """What requests of our own carry beside the variant."""
        self.scope = scope or {}
        """ASGI's, of the HTTP request."""
        self.began = time.monotonic()
        """When the request came in, seconds."""
        self.meter = meter
        """What the engine does for the request is noted here."""
        self.body: Any = None
        """The request as vLLM has parsed it (pydantic), once its model name is checked."""
        self.assignment: Any = None
        """What the directory noted of its choice."""
        self.counted = False
        """Live statistics count the request's tokens."""
        self.answered = False
        """An answer carries the variant's name."""
        self.asked = served.name if served is not None else ""
        """The model name that was asked for."""
        self._holds = 1

    @property
    def ended(self) -> bool:
        return self._holds == 0

    def admit(self, model: str) -> Served | None:
        """Resolve a model name and pin the variant; None if unknown, or not the name asked first.

        No await between the two: whoever moves the alias sees either no request or a pinned one.
        """
        if self.served is not None:
            return self.served if model in (self.asked, self.served.name) else None
        if self.directory is None or self.ended:
            return None
        served = self.directory.resolve(model, self)
        if served is not None:
            self.directory.pin(served)
            self.served, self.asked = served, model
            self.counted = self.directory.counts(model)
        return served

    def hold(self) -> None:
        """Keep the variant pinned beyond the response, until ``release``."""
        self._holds += 1

    def release(self) -> None:
        """Give up one hold; the last one unpins."""
        self._holds -= 1
        if self.ended and self.directory is not None and self.served is not None:
            self.directory.unpin(self.served)


_directory: Directory | None = None
_admission: ContextVar[Admission | None] = ContextVar("liveprune_admission", default=None)


def install(directory: Directory | None) -> None:
    """Set the directory of this process; None takes it away. Open admissions keep theirs."""
    global _directory  # noqa: PLW0603 - one server in a process
    _directory = directory


def installed() -> Directory | None:
    """The directory of this process."""
    return _directory


def current() -> Admission | None:
    """The admission of the request that is being answered here; None outside of one."""
    return _admission.get()


@contextmanager
def admitting(scope: Mapping[str, Any] | None = None) -> Iterator[Admission]:
    """Open the admission of one HTTP request; tasks that are started inside share it."""
    admission = Admission(_directory, scope=scope)
    token = _admission.set(admission)
    try:
        yield admission
    finally:
        admission.release()
        _admission.reset(token)


@contextmanager
def serving(
    served: Served, extra: Mapping[str, str] | None = None, meter: Meter | None = None
) -> Iterator[None]:
    """Send requests of our own to a variant; the caller keeps it live.

    Args:
        served: the variant.
        extra: what they carry beside it.
        meter: notes what the engine does for them.
    """
    token = _admission.set(Admission(None, served, extra, meter=meter))
    try:
        yield
    finally:
        _admission.reset(token)


def wrap_check_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Note the parsed request before its model name is resolved, which may depend on it."""

    async def _check_model(self: Any, request: Any) -> Any:
        admission = _admission.get()
        if admission is not None:
            admission.body = request
        return await original(self, request)

    return _check_model


def wrap_is_model_supported(original: Callable[..., Any]) -> Callable[..., Any]:
    """The check of the model name admits the request; no name stands for the bare name.

    A name that is not known is refused even under ``VLLM_SKIP_MODEL_NAME_VALIDATION``: names choose
    what answers.
    """

    def _is_model_supported(self: Any, model_name: str | None) -> Any:
        admission = _admission.get()
        if admission is None or admission.directory is None:
            return original(self, model_name)
        if model_name in self.models.lora_requests:
            return original(self, model_name)
        return admission.admit(model_name or _bare_name(self)) is not None

    return _is_model_supported


def wrap_maybe_get_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    """A request that names an adapter runs on the base, which must be live and stay so."""

    def _maybe_get_adapters(
        self: Any, request: Any, supports_default_mm_loras: bool = False
    ) -> Any:
        from vllm.exceptions import VLLMValidationError

        adapter = original(self, request, supports_default_mm_loras)
        admission = _admission.get()
        if adapter is None or admission is None or admission.directory is None:
            return adapter
        base = f"{_bare_name(self)}:{BASE_TAG}"
        if admission.served is None and admission.admit(base) is None:
            raise VLLMValidationError(
                f"The adapter `{request.model}` runs on `{base}`, which is not live.",
                parameter="model",
            )
        return adapter

    return _maybe_get_adapters


def wrap_model_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """Answers, and each chunk of a stream, name the variant that gave them."""

    def model_name(self: Any, lora_request: Any = None) -> Any:
        admission = _admission.get()
        if lora_request is not None or admission is None or admission.served is None:
            return original(self, lora_request)
        admission.answered = True
        return admission.served.name

    return model_name


def wrap_create_responses(original: Callable[..., Any]) -> Callable[..., Any]:
    """A background response goes on after its HTTP response: so does its pin."""

    async def create_responses(self: Any, request: Any, raw_request: Any = None) -> Any:
        answer = await original(self, request, raw_request)
        admission = _admission.get()
        if request.background and admission is not None:
            task = self.background_tasks.get(request.request_id)
            if task is not None:
                admission.hold()
                task.add_done_callback(lambda _: admission.release())
        return answer

    return create_responses


def wrap_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """The door to the engine, for every endpoint.

    Here and not in ``InputProcessor.process_inputs``, which may run in a thread that has another
    context. Children (``n`` > 1), beams and the chunks of a streamed input inherit what is set.
    """

    async def add_request(
        self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        return await original(self, request_id, prompt, carrying(params), *args, **kwargs)

    return add_request


def carrying(params: Any) -> Any:
    """Return sampling parameters that carry the admitted variant, and nothing a client forged.

    ``params`` itself is never changed; it is returned where there is nothing to change.

    Raises:
        VLLMValidationError: pooling parameters, which carry no variant, for one that is not the
            base; or the request was not admitted.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.pooling_params import PoolingParams

    served = _admitted()
    if isinstance(params, PoolingParams):
        if served is not None and served.slot != BASE_SLOT:
            raise VLLMValidationError(
                f"The model `{served.name}` generates text only; pooling and embeddings need the "
                f"base model, `{served.name.rpartition(':')[0]}:{BASE_TAG}`.",
                parameter="model",
            )
        return params
    extra = dict(params.extra_args or {})
    if served is not None:
        admission = _admission.get()
        own: dict[str, Any] = {} if admission is None else dict(admission.extra)
        if admission is not None and admission.counted:
            own[COUNT_KEY] = True
        extra[EXTRA_ARG] = {**own, "slot": served.slot, "salt": served.salt}
    elif EXTRA_ARG in extra:
        del extra[EXTRA_ARG]
    else:
        return params
    carried = copy.copy(params)
    carried.extra_args = extra or None
    return carried


def _admitted() -> Served | None:
    """The variant of the current request; None where there is no directory."""
    from vllm.exceptions import VLLMValidationError

    admission = _admission.get()
    if admission is not None and admission.directory is None:
        return admission.served
    if admission is None and _directory is None:
        return None
    # Fail closed: the base is not always live, and what is not pinned may go at any moment.
    if admission is None or admission.served is None:
        raise VLLMValidationError("The request chose no variant.", parameter="model")
    if admission.ended:
        raise VLLMValidationError(f"The request to `{admission.served.name}` has ended.")
    return admission.served


def _bare_name(serving: Any) -> str:
    return str(serving.models.base_model_paths[0].name)
