"""What users ask of the engine at this moment, as its API server sees it: for background work,
which gives way to them.

Requests of candidates are told by their names; all others count as users'.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from liveprune.patches.compat import Seam
from liveprune.patches.request_meter import note_step

PROCESS_OUTPUTS = Seam(
    "vllm.v1.engine.output_processor",
    "OutputProcessor.process_outputs",
    (
        "self",
        "engine_core_outputs",
        "engine_core_timestamp",
        "iteration_stats",
        "weight_version",
    ),
)
CANDIDATE = "candidate-"
"""What the names of candidates' requests begin with; vLLM puts ``cmpl-`` and the like before names
that clients choose."""
_LISTENER = "liveprune_traffic"


class UserTraffic:
    """Users' requests in one engine; lives in the event loop of the API server."""

    def __init__(self, client: Any) -> None:
        """``client``: vLLM's AsyncLLM."""
        self._processor = client.output_processor
        self._last: dict[str, float] = {}
        """When each user's request got its last token, seconds of a monotonic clock."""
        self._listeners: list[Callable[[float], None]] = []
        setattr(self._processor, _LISTENER, self)

    @property
    def in_flight(self) -> int:
        """Users' requests that are not answered yet."""
        return sum(not name.startswith(CANDIDATE) for name in self._processor.request_states)

    @property
    def waiting(self) -> int:
        """Those of them without a first token: in the queue, or being read."""
        return sum(
            state.is_prefilling and not name.startswith(CANDIDATE)
            for name, state in self._processor.request_states.items()
        )

    def listen(self, listener: Callable[[float], None]) -> None:
        """Have ``listener`` told of each step: seconds since the tokens before, mean over users."""
        self._listeners.append(listener)

    def observe(self, outputs: list[Any], timestamp: float | None) -> None:
        """Note one step's outputs (vLLM's EngineCoreOutput)."""
        now = time.monotonic() if timestamp is None else timestamp
        between = []
        for output in outputs:
            name = output.request_id
            if name.startswith(CANDIDATE):
                continue
            if output.new_token_ids:
                if (before := self._last.get(name)) is not None:
                    between.append(now - before)
                self._last[name] = now
            if output.finish_reason is not None:
                self._last.pop(name, None)
        if len(self._last) > 2 * len(self._processor.request_states) + 16:  # aborted ones
            known = self._processor.request_states
            self._last = {name: at for name, at in self._last.items() if name in known}
        if between:
            for listener in self._listeners:
                listener(sum(between) / len(between))


def wrap_process_outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Show each step's outputs to whoever watches this engine's users, and to their meters."""

    def process_outputs(
        self: Any,
        engine_core_outputs: Any,
        engine_core_timestamp: Any = None,
        iteration_stats: Any = None,
        weight_version: Any = None,
    ) -> Any:
        traffic = getattr(self, _LISTENER, None)
        if traffic is not None:
            traffic.observe(engine_core_outputs, engine_core_timestamp)
        note_step(self, engine_core_outputs)
        return original(
            self, engine_core_outputs, engine_core_timestamp, iteration_stats, weight_version
        )

    return process_outputs
