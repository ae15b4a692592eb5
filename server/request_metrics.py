"""Prometheus metrics of requests by the variant that answered, in or out of experiments.

Counted here and shown by the collector of ``live_metrics``, for its reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from liveprune.server.histogram import Histogram

OUTCOMES = ("ok", "error", "aborted")
KINDS = ("loop", "empty", "bad_json", "bad_tool_call")
"""Signals of degenerate outputs."""
_LABELS = ("model", "variant")


@dataclass(frozen=True)
class _Family:
    """A histogram that every variant has."""

    metric: str
    """Name of the value (``experiments.metrics``)."""
    name: str
    documentation: str
    buckets: str
    """vLLM's name of the family whose bounds are taken."""


_FAMILIES = (
    _Family(
        "e2e_seconds",
        "liveprune_request_duration_seconds",
        "Requests from their arrival to the last byte of a good answer.",
        "request_latency",
    ),
    _Family(
        "ttft_seconds",
        "liveprune_time_to_first_token_seconds",
        "From a request's arrival to its first token (streams: sent to the client).",
        "time_to_first_token",
    ),
    _Family(
        "inter_token_seconds",
        "liveprune_inter_token_seconds",
        "Mean time between the tokens of a request.",
        "inter_token_latency",
    ),
    _Family(
        "output_tokens",
        "liveprune_output_tokens",
        "Tokens generated per request.",
        "request_tokens",
    ),
)


@dataclass
class _Variant:
    """What was counted of one variant."""

    histograms: dict[str, Histogram]
    """By metric."""
    outcomes: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(OUTCOMES, 0)))
    finishes: Counter[str] = field(default_factory=Counter)
    degenerate: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(KINDS, 0)))


class RequestMetrics:
    """Counts by variant; callable from the event loop only."""

    def __init__(self, buckets: Callable[[str], Sequence[float]]) -> None:
        """``buckets``: upper bounds of a family of vLLM's histograms."""
        self._buckets = {family.metric: buckets(family.buckets) for family in _FAMILIES}
        self._variants: dict[str, _Variant] = {}

    def observe(
        self,
        variant: str,
        outcome: str,
        values: Mapping[str, float],
        judgements: Iterable[Mapping[str, float]],
    ) -> None:
        """Count a request.

        Args:
            variant: full name.
            outcome: one of ``OUTCOMES``.
            values: metric to value; those that have no histogram are passed over.
            judgements: signals of each of its sequences.
        """
        found = self._of(variant)
        found.outcomes[outcome] += 1
        for metric, histogram in found.histograms.items():
            if metric in values:
                histogram.observe(values[metric])
        for judgement in judgements:
            found.degenerate.update(kind for kind in KINDS if judgement.get(kind))

    def ended(self, variant: str, reason: str) -> None:
        """Count how a sequence ended."""
        self._of(variant).finishes[reason] += 1

    def _of(self, variant: str) -> _Variant:
        found = self._variants.get(variant)
        if found is None:
            histograms = {metric: Histogram(bounds) for metric, bounds in self._buckets.items()}
            found = self._variants[variant] = _Variant(histograms)
        return found

    def keep(self, live: Collection[str]) -> None:
        """Forget variants that are not among ``live`` (full names)."""
        self._variants = {name: x for name, x in self._variants.items() if name in live}

    def families(self, model: str) -> list[Metric]:
        """All families, with a sample of each variant that has had a request."""
        return _families(model, self._variants)


def request_metrics(metrics: RequestMetrics | None, model: str | None) -> list[Metric]:
    """The families of ``metrics``; without samples where it or the model is not known."""
    return _families("", {}) if metrics is None or model is None else metrics.families(model)


def _families(model: str, variants: Mapping[str, _Variant]) -> list[Metric]:
    found: list[Metric] = []
    for family in _FAMILIES:
        histogram = HistogramMetricFamily(family.name, family.documentation, labels=_LABELS)
        for variant, counted in variants.items():
            values = counted.histograms[family.metric]
            histogram.add_metric((model, variant), values.cumulated(), values.total)
        found.append(histogram)
    counters: tuple[tuple[str, str, str, Callable[[_Variant], Counter[str]]], ...] = (
        (
            "liveprune_requests_total",
            "Requests that generate, by how they ended; those refused (4xx) are not counted.",
            "outcome",
            lambda x: x.outcomes,
        ),
        (
            "liveprune_finish_reasons_total",
            "Sequences by why they ended.",
            "reason",
            lambda x: x.finishes,
        ),
        (
            "liveprune_degenerate_outputs_total",
            "Sequences that show a failure of pruned models.",
            "kind",
            lambda x: x.degenerate,
        ),
    )
    for name, documentation, label, read in counters:
        counter = CounterMetricFamily(name, documentation, labels=(*_LABELS, label))
        for variant, counted in variants.items():
            for value, count in read(counted).items():
                counter.add_metric((model, variant, value), count)
        found.append(counter)
    return found
