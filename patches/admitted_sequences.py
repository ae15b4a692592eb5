"""Sequences that the engine is asked for belong to the request in whose context that happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from liveprune.patches import admission
from liveprune.patches.compat import Seam
from liveprune.patches.request_spans import name_span

ADD_REQUEST = Seam(
    "vllm.v1.engine.output_processor",
    "OutputProcessor.add_request",
    ("self", "request", "prompt", "parent_req", "request_index", "queue"),
)


def wrap_output_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Tie a sequence to its request's meter, and its span to the names of the request.

    Here and not in ``AsyncLLM.add_request``: each of ``n`` sequences passes here by itself.
    """

    def add_request(
        self: Any,
        request: Any,
        prompt: Any,
        parent_req: Any = None,
        request_index: int = 0,
        queue: Any = None,
    ) -> Any:
        added = original(self, request, prompt, parent_req, request_index, queue)
        admitted = admission.current()
        if admitted is None:
            return added
        if admitted.meter is not None:
            admitted.meter.tie(self, request)
        if self.tracing_enabled and admitted.served is not None:
            state = self.request_states[request.request_id]
            name_span(state, asked=admitted.asked, answered=admitted.served.name)
        return added

    return add_request
