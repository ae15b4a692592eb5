"""A server's metrics with samples in every family."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from liveprune.server.experiment_models import (
    ArmBody,
    DecisionBody,
    ExperimentBody,
    FindingBody,
)
from liveprune.server.experiments.definition import experiment_from
from liveprune.server.live_metrics import LiveMetrics
from liveprune.server.operations import Operation, State
from liveprune.server.request_metrics import RequestMetrics
from liveprune.server.store.jobs import Job, JobState
from tests.server.fake_control import FakeControl, view
from tests.server.jobs.job_world import stored

DEFINITION = {
    "name": "halve",
    "model": "tiny",
    "arms": [
        {"name": "full", "variant": "full", "weight": 0.9},
        {"name": "pruned", "variant": "e4", "weight": 0.1},
    ],
    "control": "full",
    "primary": {"metric": "e2e_seconds", "statistic": "p95"},
    "guardrails": [
        {"metric": "loop", "margin": 0.01},
        {"metric": "e2e_seconds", "statistic": "p95", "margin": 0.1, "relative": True},
        {"metric": "score", "margin": 0.05, "relative": True},
    ],
}


def arm(name: str, share: float, **changes: Any) -> ArmBody:
    facts: dict[str, Any] = {"shadow": False, "units": 0, "requests": 0, "metrics": {}}
    return ArmBody(name=name, variant=f"v-{name}", share=share, **{**facts, **changes})


def finding(measure: str, role: str, **changes: Any) -> FindingBody:
    facts: dict[str, Any] = {
        "arm": "pruned",
        "state": "unclear",
        "control": 2.0,
        "treatment": 1.5,
        "lower": -0.75,
        "upper": 0.25,
        "limit": 0.0,
        "count": 40,
    }
    return FindingBody.model_validate({"measure": measure, "role": role, **facts, **changes})


def decision(verdict: str, *findings: FindingBody, p: float = 0.5) -> DecisionBody:
    facts: dict[str, Any] = {"arm": None, "reasons": [], "actions": [], "withheld": []}
    return DecisionBody(
        id=1, time=1000.0, verdict=verdict, mismatch_p=p, findings=list(findings), **facts
    )


def experiment(name: str = "halve", **changes: Any) -> ExperimentBody:
    facts: dict[str, Any] = {
        "state": "running",
        "definition": experiment_from({**DEFINITION, "name": name}).to_json(),
        "created": 900.0,
        "started": 950.0,
        "ended": None,
        "reason": None,
        "paused": None,
        "phase": 0,
        "phase_started": 950.0,
        "arms": [arm("full", 0.9, units=90, requests=180), arm("pruned", 0.1, units=11)],
        "decision": None,
    }
    return ExperimentBody(name=name, **{**facts, **changes})


def job() -> Job:
    facts: dict[str, Any] = dict.fromkeys(
        ("started", "finished", "owner", "lease_until", "result"), None
    )
    return Job(
        id="0" * 32,
        request=stored(tag="e2").model_dump(mode="json"),
        state=JobState.RUNNING,
        created=1000.0,
        attempt=0,
        cancel_asked=False,
        progress={"ratio": 0.25},
        best={"fitness": 0.5},
        cost={"evaluations": 7},
        error="",
        **facts,
    )


def experiments_of_all_kinds() -> list[ExperimentBody]:
    findings = (finding("e2e_seconds p95", "primary"), finding("e2e_seconds p95", "guardrail"))
    return [
        experiment(decision=decision("HOLD", *findings)),
        experiment("old", state="rolled_back", ended=990.0),
    ]


def full_metrics(
    control: FakeControl | None = None, experiments: list[ExperimentBody] | None = None
) -> LiveMetrics:
    """Of a server that has done everything there is; ``experiments`` may change later."""
    swap = Operation("swap", "tiny:e4", state=State.DONE, created=1000.0, finished=1001.5)
    control = control or FakeControl(known=[view("full"), view("e4")])
    control.made[swap.id] = swap
    drift = SimpleNamespace(mean=0.1, maximum=0.2)
    calibration = SimpleNamespace(
        counted_by_name=lambda: {"tiny:full": 1000.0},
        last_summary=SimpleNamespace(serving="tiny:full", drift=drift),
    )
    found = experiments_of_all_kinds() if experiments is None else experiments

    async def jobs() -> list[Job]:
        return [job()]

    async def bodies() -> list[ExperimentBody]:
        return list(found)

    requests = RequestMetrics(lambda _: (0.1, 1.0, 10.0))
    values = dict.fromkeys(("e2e_seconds", "ttft_seconds", "inter_token_seconds"), 0.5)
    requests.observe("tiny:e4", "ok", {**values, "output_tokens": 7.0}, [{"loop": 1.0}])
    requests.ended("tiny:e4", "length")
    metrics = LiveMetrics(control, cast("Any", calibration), jobs, requests, bodies)
    asyncio.run(metrics.refresh())
    return metrics
