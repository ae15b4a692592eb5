"""vLLM's request spans name the model that was asked for and the variant that answered.

Attributes of OpenTelemetry's GenAI conventions. vLLM makes and ends a span in one call, so they are
added to that call's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from liveprune.patches.compat import Seam

DO_TRACING = Seam(
    "vllm.v1.engine.output_processor",
    "OutputProcessor.do_tracing",
    ("self", "engine_core_output", "req_state", "iteration_stats"),
)
INSTRUMENT = Seam(
    "vllm.tracing",
    "instrument_manual",
    ("span_name", "start_time", "end_time", "attributes", "context", "kind"),
)
INSTRUMENT_USERS = ("vllm.v1.engine.output_processor",)
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"

_NAMES = "liveprune_names"
"""Attribute of vLLM's RequestState: what its span gets."""
_names: ContextVar[dict[str, str] | None] = ContextVar("liveprune_span", default=None)


def name_span(state: Any, *, asked: str, answered: str) -> None:
    """Give the span of a sequence (vLLM's RequestState) its names."""
    setattr(state, _NAMES, {REQUEST_MODEL: asked, RESPONSE_MODEL: answered})


def wrap_do_tracing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Say whose span is made."""

    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> Any:
        token = _names.set(getattr(req_state, _NAMES, None))
        try:
            return original(self, engine_core_output, req_state, iteration_stats)
        finally:
            _names.reset(token)

    return do_tracing


def wrap_instrument(original: Callable[..., Any]) -> Callable[..., Any]:
    """Add the names to the span of a request; other spans are left as they are."""

    def instrument_manual(
        span_name: str,
        start_time: int,
        end_time: int | None = None,
        attributes: dict[str, Any] | None = None,
        context: Any = None,
        kind: Any = None,
    ) -> Any:
        if (names := _names.get()) is not None:
            attributes = {**(attributes or {}), **names}
        return original(span_name, start_time, end_time, attributes, context, kind)

    return instrument_manual
