"""Prometheus metrics of background jobs; a job's own series are gone when it is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from liveprune.server.jobs.request import StoredRequest
from liveprune.server.store.jobs import Job, JobState


def job_metrics(model: str | None, jobs: Sequence[Job]) -> Iterator[Metric]:
    """All families; ``model`` None, before the first look at the engine, leaves them empty."""
    progress = GaugeMetricFamily(
        "liveprune_job_progress_ratio",
        "Part of a running job's stage that is done.",
        labels=("model", "variant"),
    )
    evaluations = CounterMetricFamily(
        "liveprune_job_evaluations_total",
        "Plans that a running job has had scored, in all calls of its engine.",
        labels=("model", "variant"),
    )
    best = GaugeMetricFamily(
        "liveprune_job_best_fitness",
        "Mean train fitness of a running job's best candidate.",
        labels=("model", "variant"),
    )
    states = GaugeMetricFamily(
        "liveprune_jobs", "Jobs that the store knows.", labels=("model", "state")
    )
    if model is not None:
        counts = Counter(job.state for job in jobs)
        for state in JobState:
            states.add_metric((model, state.value), counts[state])
        for job in jobs:
            if job.state is not JobState.RUNNING:
                continue
            labels = (model, f"{model}:{StoredRequest.model_validate(job.request).request.tag}")
            if (ratio := job.progress.get("ratio")) is not None:
                progress.add_metric(labels, ratio)
            evaluations.add_metric(labels, job.cost.get("evaluations", 0))
            if job.best is not None:
                best.add_metric(labels, job.best["fitness"])
    yield from (progress, evaluations, best, states)
