"""Prometheus metrics of live statistics: tokens counted, and drift of what serves."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from liveprune.server.live_calibration import LiveCalibration

LABELS = ("model", "variant")


def calibration_metrics(calibration: LiveCalibration | None, model: str | None) -> Iterator[Metric]:
    """All families; without samples where nothing is counted or no model is known yet."""
    tokens = CounterMetricFamily(
        "liveprune_statistics_tokens_total",
        "Tokens of users' requests whose routing was counted.",
        labels=LABELS,
    )
    mean = GaugeMetricFamily(
        "liveprune_calibration_drift_ratio",
        "Jensen-Shannon divergence (base 2) of expert usage now and in calibration, mean over "
        "layers.",
        labels=LABELS,
    )
    largest = GaugeMetricFamily(
        "liveprune_calibration_drift_max_ratio",
        "The same, of the layer that has moved most.",
        labels=LABELS,
    )
    if calibration is not None and model is not None:
        for name, count in calibration.counted_by_name().items():
            tokens.add_metric((model, name), count)
        summary = calibration.last_summary
        if summary is not None and summary.drift is not None:
            mean.add_metric((model, summary.serving), summary.drift.mean)
            largest.add_metric((model, summary.serving), summary.drift.maximum)
    yield from (tokens, mean, largest)
