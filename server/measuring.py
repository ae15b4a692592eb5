"""Where every request that has been answered is handed over: experiments, metrics, listeners."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from liveprune.patches.live_types import Served
from liveprune.patches.request_meter import Generation
from liveprune.server.experiments.live import Assignment, LiveExperiments
from liveprune.server.request_metrics import RequestMetrics

Outcome = Literal["ok", "error", "aborted"]
"""``error``: the server's; ``aborted``: the client went before its answer had ended."""


@dataclass(frozen=True)
class Measured:
    """A request to a variant that generates, after its end."""

    served: Served
    assignment: Assignment | None
    outcome: Outcome
    values: Mapping[str, float]
    """Metric (``experiments.metrics``) to value; none if aborted, only ``error`` after one."""
    judgements: Sequence[Mapping[str, float]]
    """Signals (``experiments.quality``) of each sequence; none unless ``ok``."""
    generations: Sequence[Generation]
    """With prompts and tokens by reference: what is kept of them is kept in memory."""
    response_id: str | None
    """``id`` of the answer as the client sees it."""


Listener = Callable[[Measured], None]


class Measuring:
    """Lives in the event loop of the API server.

    Attributes:
        listeners: called for each request that an experiment assigned and that was answered well,
            after its last byte was sent; must not block.
    """

    def __init__(self, experiments: LiveExperiments, metrics: RequestMetrics) -> None:
        self._experiments, self._metrics = experiments, metrics
        self.listeners: list[Listener] = []

    def finished(self, request: Measured) -> None:
        """Take in a request that has ended."""
        self._metrics.observe(
            request.served.name, request.outcome, request.values, request.judgements
        )
        for generation in request.generations:
            self._metrics.ended(request.served.name, generation.finish or "abort")
        assigned = request.assignment
        if assigned is None or request.outcome == "aborted":
            return
        # The measures of a shadow arm are those of the copy, not of the control's answer.
        if assigned.shadow is None:
            self._experiments.finished(assigned, request.values)
        if request.outcome != "ok":
            return
        if assigned.shadow is None and request.response_id is not None:
            self._experiments.answered(request.response_id, assigned)
        for listener in self.listeners:
            listener(request)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Be the one that requests are handed to."""
        global _installed  # noqa: PLW0603 - one server in a process
        _installed = self
        try:
            yield
        finally:
            _installed = None


_installed: Measuring | None = None


def installed() -> Measuring | None:
    """That of the running server; None where nothing is measured."""
    return _installed
