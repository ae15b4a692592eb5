"""Prometheus metrics of experiments; the series of one that has ended are gone.

The numbers are those of the store, summed over replicas, so all replicas show the same; only
``paused`` is a replica's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from liveprune.server.experiment_models import (
    ExperimentBody,
    ExperimentState,
    FindingBody,
)
from liveprune.server.experiments.decision import Verdict
from liveprune.server.experiments.metrics import Measure

_EXPERIMENT = ("model", "experiment")
_ARM = (*_EXPERIMENT, "arm")
_FINDING = (*_ARM, "measure", "role")


def experiment_metrics(model: str | None, bodies: Sequence[ExperimentBody]) -> Iterator[Metric]:
    """All families; ``model`` None, before the first look at the engine, leaves them empty."""
    running = [body for body in bodies if model is not None and body.state == "running"]
    yield from _counts(model, bodies)
    yield from _arms(model or "", running)
    yield from _states(model or "", running)
    yield from _findings(model or "", running)


def _counts(model: str | None, bodies: Sequence[ExperimentBody]) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "liveprune_experiments",
        "Experiments that the store knows, by state.",
        labels=("model", "state"),
    )
    ends = GaugeMetricFamily(
        "liveprune_experiments_last_end_timestamp_seconds",
        "When the last experiment ended in this way, in seconds since 1970.",
        labels=("model", "state"),
    )
    if model is not None:
        counts = Counter(body.state for body in bodies)
        for state in get_args(ExperimentState):
            states.add_metric((model, state), counts[state])
            ended = [body.ended for body in bodies if body.state == state and body.ended]
            if ended:
                ends.add_metric((model, state), max(ended))
    yield from (states, ends)


def _arms(model: str, running: Sequence[ExperimentBody]) -> Iterator[Metric]:
    shares = GaugeMetricFamily(
        "liveprune_experiment_share_ratio",
        "Part of an experiment's units that an arm is to get now.",
        labels=_ARM,
    )
    units = GaugeMetricFamily(
        "liveprune_experiment_units",
        "Distinct units that an arm has got, since the start and over all replicas.",
        labels=_ARM,
    )
    requests = GaugeMetricFamily(
        "liveprune_experiment_requests",
        "Requests of an arm that were measured, since the start and over all replicas.",
        labels=_ARM,
    )
    for body in running:
        for arm in body.arms:
            labels = (model, body.name, arm.name)
            shares.add_metric(labels, arm.share)
            units.add_metric(labels, arm.units)
            requests.add_metric(labels, arm.requests)
    yield from (shares, units, requests)


def _states(model: str, running: Sequence[ExperimentBody]) -> Iterator[Metric]:
    mismatch = GaugeMetricFamily(
        "liveprune_experiment_srm_pvalue",
        "Always-valid p-value of units falling into the arms by their shares.",
        labels=_EXPERIMENT,
    )
    verdicts = GaugeMetricFamily(
        "liveprune_experiment_verdict",
        "1 for the newest verdict, 0 for the others; all 0 before the first.",
        labels=(*_EXPERIMENT, "verdict"),
    )
    paused = GaugeMetricFamily(
        "liveprune_experiment_paused",
        "1 if this replica routes nothing by the experiment.",
        labels=_EXPERIMENT,
    )
    for body in running:
        labels = (model, body.name)
        paused.add_metric(labels, int(body.paused is not None))
        if body.decision is not None:
            mismatch.add_metric(labels, body.decision.mismatch_p)
        for verdict in get_args(Verdict):
            present = body.decision is not None and body.decision.verdict == verdict
            verdicts.add_metric((*labels, verdict), int(present))
    yield from (mismatch, verdicts, paused)


def _findings(model: str, running: Sequence[ExperimentBody]) -> Iterator[Metric]:
    difference = GaugeMetricFamily(
        "liveprune_experiment_difference",
        "Treatment minus control (for a relative margin: minus control times one plus the margin) "
        "in the measure's unit: seconds, tokens, nats or a ratio.",
        labels=_FINDING,
    )
    lower = GaugeMetricFamily(
        "liveprune_experiment_difference_lower",
        "Always-valid lower bound of the difference; none while it is unbounded.",
        labels=_FINDING,
    )
    upper = GaugeMetricFamily(
        "liveprune_experiment_difference_upper",
        "Always-valid upper bound of the difference; none while it is unbounded.",
        labels=_FINDING,
    )
    limit = GaugeMetricFamily(
        "liveprune_experiment_difference_limit",
        "What the bounds of the difference are compared with.",
        labels=_FINDING,
    )
    for body in running:
        if body.decision is None:
            continue
        scales = _scales(body.definition)
        for finding in body.decision.findings:
            labels = (model, body.name, finding.arm, finding.measure, finding.role)
            limit.add_metric(labels, finding.limit)
            for family, value in (
                (difference, _difference(finding, scales)),
                (lower, finding.lower),
                (upper, finding.upper),
            ):
                if value is not None:
                    family.add_metric(labels, value)
    yield from (difference, lower, upper, limit)


def _difference(finding: FindingBody, scales: Mapping[str, float]) -> float | None:
    if finding.treatment is None or finding.control is None:
        return None
    scale = scales.get(finding.measure, 1.0) if finding.role == "guardrail" else 1.0
    return finding.treatment - scale * finding.control


def _scales(definition: Mapping[str, Any]) -> dict[str, float]:
    """Measure of a relative guardrail to what the control arm's value is multiplied by."""
    scales = {}
    for each in definition["guardrails"]:
        if each["relative"]:
            label = Measure(each["metric"], each["statistic"]).label
            margin = each["margin"]
            scales[label] = 1 + margin if each["better"] == "lower" else 1 - margin
    return scales
