"""A server as the dashboard page may find it: OLMoE on one GPU, an experiment, a search."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from fastapi import FastAPI

from liveprune.server.admin_api import make_app
from liveprune.server.admin_key import key_digest
from liveprune.server.audit import AuditLog
from liveprune.server.experiment_models import (
    DecisionBody,
    ExperimentBody,
    FindingBody,
)
from liveprune.server.experiment_service import ExperimentService
from liveprune.server.experiments.definition import experiment_from
from liveprune.server.jobs.service import JobService
from liveprune.server.layer_views import LayerView
from liveprune.server.operations import Operation, State, Status, VariantView
from liveprune.server.store.jobs import Job, JobState
from liveprune.server.store.store import Store
from tests.server.fake_control import KEY, FakeControl

MODEL = "olmoe"
LAYERS, EXPERTS = 16, 64
GIB, MIB = 1 << 30, 1 << 20
ROW = 12 * MIB


def whole() -> list[LayerView]:
    ids = tuple(range(EXPERTS))
    return [LayerView(i, EXPERTS, EXPERTS, 8, ids, (), ()) for i in range(LAYERS)]


def pruned(keep: int, seed: int) -> list[LayerView]:
    choose = np.random.default_rng(seed)
    found = []
    for i in range(LAYERS):
        kept = tuple(sorted(choose.choice(EXPERTS, keep, replace=False).tolist()))
        found.append(LayerView(i, EXPERTS, keep, 8, kept, (), ()))
    return found


def merged(seed: int) -> list[LayerView]:
    """Other counts and top-k in each layer; some experts are parts of new ones."""
    choose = np.random.default_rng(seed)
    found = []
    for i in range(LAYERS):
        keep = 44 - 2 * i
        order = choose.permutation(EXPERTS).tolist()
        kept, parts = sorted(order[:keep]), sorted(order[keep : keep + 12])
        found.append(
            LayerView(i, EXPERTS, keep + 4, 8 if i < 8 else 6, tuple(kept), tuple(parts), ())
        )
    return found


def variant(tag: str, layers: Sequence[LayerView], **changes: Any) -> VariantView:
    experts, top_k = [x.remaining for x in layers], [x.top_k for x in layers]
    facts: dict[str, Any] = {
        "name": f"{MODEL}:{tag}",
        "tag": tag,
        "digest": None if tag == "full" else f"{hash_of(tag):064x}",
        "state": "live",
        "is_alias": False,
        "is_previous": False,
        "experts": {"min": min(experts), "max": max(experts), "total": sum(experts)},
        "top_k": {"min": min(top_k), "max": max(top_k)},
        "row_bytes": sum(experts) * ROW,
        "in_flight": 0,
    }
    return VariantView(**{**facts, **changes})


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode().ljust(32, b"\x5a")[:32], "big")


class DashboardControl(FakeControl):
    """``memory``: what ``Status`` says of it."""

    def __init__(self) -> None:
        self.plans = {"full": whole(), "reap-32": pruned(32, 1), "eep-mixed": merged(2)}
        super().__init__(
            known=[
                variant("full", self.plans["full"], is_previous=True, in_flight=11),
                variant("reap-32", self.plans["reap-32"], is_alias=True, in_flight=14),
                variant("eep-mixed", self.plans["eep-mixed"], state="standby", row_bytes=0),
            ],
            kept=self.plans,
        )
        self.memory: dict[str, Any] = {
            "expert_bytes": LAYERS * EXPERTS * ROW,
            "spare_bytes": 64 * ROW,
            "other_weight_bytes": 912 * MIB,
            "kv_bytes": 6 * GIB + 320 * MIB,
            "kv_blocks": 3160,
            "kv_max_blocks": 8192,
            "process_bytes": 21 * GIB,
            "memory_target_bytes": 24 * GIB,
        }
        now = time.time()
        earlier = Operation("swap", f"{MODEL}:reap-32", state=State.DONE, created=now - 5400)
        earlier.finished = earlier.created + 9.4
        earlier.freed_bytes = 3 * GIB
        earlier.seconds = {"filling": 2.12, "canary": 0.81, "draining": 6.2, "queued": 0.0004}
        failed = Operation("add", f"{MODEL}:mone-24", state=State.FAILED, created=now - 2100)
        failed.finished = failed.created + 0.7
        failed.error = "olmoe:mone-24: needs 96 spare rows, expected at most 64; see --spare-rows"
        self.made = {earlier.id: earlier, failed.id: failed}

    async def status(self) -> Status:
        status = await super().status()
        alias = next(view.name for view in self.known if view.is_alias)
        return replace(status, model=MODEL, alias=alias, **self.memory)

    def begin_swap(self) -> Operation:
        operation = Operation("swap", f"{MODEL}:eep-mixed", state=State.FILLING)
        operation.bytes_total, operation.bytes_done = 300 * ROW, 171 * ROW
        operation.seconds = {"queued": 0.0006, "making-room": 0.42}
        self.made[operation.id] = operation
        return operation


DEFINITION: dict[str, Any] = {
    "name": "halve",
    "model": MODEL,
    "arms": [
        {"name": "whole", "variant": "full", "weight": 0.9},
        {"name": "half", "variant": "reap-32", "weight": 0.1},
    ],
    "control": "whole",
    "primary": {"metric": "e2e_seconds", "statistic": "p95"},
    "guardrails": [
        {"metric": "loop", "margin": 0.01},
        {"metric": "error", "margin": 0.005},
        {"metric": "agreement", "margin": 0.05, "relative": True},
    ],
    "ramp": [0.25, 0.5],
    "actions": ["notify", "rollback", "ramp"],
}


def finding(measure: str, estimate: float, width: float, count: int, **facts: Any) -> FindingBody:
    given: dict[str, Any] = {
        "arm": "half",
        "measure": measure,
        "role": "guardrail",
        "lower": estimate - width,
        "upper": estimate + width,
        "count": count,
        "state": "unclear",
    }
    return FindingBody(**{**given, **facts})


def decision(i: int, start: float) -> DecisionBody:
    """The i-th look at ``halve``, one a minute; intervals narrow with the square root of time."""
    units = 60 * (i + 1)
    noise = math.sin(i * 1.7) + math.sin(i * 0.61)
    narrow = 1 / math.sqrt(units / 60)
    gain = -0.31 + 0.05 * noise * narrow
    primary = finding(
        "e2e_seconds p95",
        gain,
        1.35 * narrow,
        units,
        role="primary",
        limit=0.0,
        control=2.84,
        treatment=2.84 + gain,
    )
    if primary.upper is not None and primary.upper < 0:
        primary = primary.model_copy(update={"state": "better"})
    loop = finding(
        "loop", 0.0016, 0.093 * narrow, units, limit=0.01, control=0.0112, treatment=0.0128
    )
    error = finding(
        "error", 0.0002, 0.024 * narrow, units, limit=0.005, control=0.0008, treatment=0.001
    )
    if error.upper is not None and error.upper < 0.005:
        error = error.model_copy(update={"state": "within"})
    agreement = finding(
        "agreement",
        0.962 * 1.0 - 0.971 * 0.95,
        0.12 * narrow,
        units // 10,
        limit=0.0,
        control=0.971,
        treatment=0.962,
        lower=None if i < 4 else 0.03955 - 0.12 * narrow,
    )
    if agreement.lower is not None and agreement.lower > 0:
        agreement = agreement.model_copy(update={"state": "within"})
    open_ = [x for x in (primary, loop, error, agreement) if x.state == "unclear"]
    return DecisionBody(
        id=i + 1,
        time=start + 60 * (i + 1),
        verdict="HOLD",
        arm=None,
        reasons=[
            f"half: {x.measure}: unclear: {x.treatment:.4g} against {x.control:.4g}, difference "
            f"from {x.lower:.4g} to {x.upper:.4g}, limit {x.limit:.4g}"
            for x in open_
            if x.lower is not None and x.upper is not None
        ],
        actions=["ramp"] if i in (20, 45) else [],
        withheld=["ramp"] if i == 40 else [],
        mismatch_p=0.41,
        findings=[primary, loop, error, agreement],
    )


def metric(count: int, mean: float, *quantiles: float) -> dict[str, Any]:
    named = dict(zip(("p50", "p95", "p99"), quantiles, strict=False))
    return {"count": count, "mean": mean, **named}


def running(looks: int) -> tuple[ExperimentBody, list[DecisionBody]]:
    start = time.time() - 60 * looks
    decisions = [decision(i, start) for i in range(looks)]
    n = 60 * looks
    times = {
        "whole": (1.62, 1.44, 2.84, 3.6, 0.21, 0.18, 0.43, 0.71),
        "half": (1.31, 1.17, 2.53, 3.18, 0.18, 0.16, 0.35, 0.6),
    }
    arms = [
        {
            "name": name,
            "variant": tag,
            "share": 0.5,
            "shadow": False,
            "units": n // 2,
            "requests": n,
            "metrics": {
                "e2e_seconds": metric(n, *times[name][:4]),
                "ttft_seconds": metric(n, *times[name][4:]),
                "output_tokens": metric(n, 211.4, 180, 460, 512),
                "loop": metric(n, 0.0112 if name == "whole" else 0.0128),
                "error": metric(n, 0.0008 if name == "whole" else 0.001),
                "agreement": metric(n // 10, 0.971 if name == "whole" else 0.962),
            },
        }
        for name, tag in (("whole", "full"), ("half", "reap-32"))
    ]
    body = ExperimentBody.model_validate(
        {
            "name": "halve",
            "state": "running",
            "definition": experiment_from(DEFINITION).to_json(),
            "created": start - 5,
            "started": start,
            "ended": None,
            "reason": None,
            "paused": None,
            "phase": 2,
            "phase_started": start + 60 * 46,
            "arms": arms,
            "decision": decisions[-1].model_dump(),
        }
    )
    return body, decisions


def rolled_back() -> tuple[ExperimentBody, list[DecisionBody]]:
    """An earlier one without an aim, which ended."""
    body, seen = running(12)
    decisions = [x.model_copy(update={"findings": x.findings[1:]}) for x in seen]
    loop = (
        decisions[-1]
        .findings[0]
        .model_copy(update={"state": "worse", "lower": 0.021, "upper": 0.094, "treatment": 0.068})
    )
    said = "loop: worse: 0.068 against 0.0112, difference from 0.021 to 0.094, limit 0.01"
    last = decisions[-1].model_copy(
        update={
            "verdict": "ROLLBACK",
            "arm": "half",
            "reasons": [said],
            "actions": ["notify", "rollback"],
            "findings": [loop, *decisions[-1].findings[1:]],
        }
    )
    changed = body.model_copy(
        update={
            "name": "quarter",
            "state": "rolled_back",
            "definition": experiment_from({**DEFINITION, "primary": None}).to_json(),
            "ended": last.time,
            "reason": said,
            "decision": last,
        }
    )
    return changed, [*decisions[:-1], last]


@dataclass
class FakeExperiments:
    """What the page asks of a server's experiments."""

    found: dict[str, tuple[ExperimentBody, list[DecisionBody]]] = field(default_factory=dict)

    async def newest(self) -> list[ExperimentBody]:
        return [body for body, _ in self.found.values()]

    async def decisions(self, name: str) -> list[DecisionBody]:
        return self.found[name][1]


def job(name: str, state: JobState, **changes: Any) -> Job:
    request = {
        "method": "eep",
        "source": {"prompts": "kept"},
        "tag": name,
        "experts": "32",
        "seed": 7,
    }
    facts: dict[str, Any] = {
        "id": f"{hash_of(name):032x}"[:32],
        "request": {"request": request},
        "state": state,
        "created": time.time() - 1500,
        "started": time.time() - 1490,
        "finished": None,
        "owner": None,
        "lease_until": None,
        "attempt": 0,
        "cancel_asked": False,
        "progress": {},
        "best": None,
        "cost": {},
        "error": "",
        "result": None,
    }
    return Job(**{**facts, **changes})


class FakeJobs:
    """``step`` goes on with a search."""

    def __init__(self) -> None:
        self.evaluations = 480
        done = job(
            "reap-32",
            JobState.DONE,
            finished=time.time() - 1200,
            cost={"cpu_seconds": 41.0, "engine_seconds": 12.4, "tokens": 524288},
            request={
                "request": {
                    "method": "reap",
                    "source": {"statistics": "live"},
                    "tag": "reap-32",
                    "experts": "0.5",
                }
            },
        )
        failed = job(
            "mone-24",
            JobState.FAILED,
            finished=time.time() - 900,
            error="calib.jsonl: row 118: found no text, expected text or messages",
        )
        self.found = [job("eep-mixed", JobState.RUNNING), done, failed]
        self.step(0)

    def step(self, evaluations: int) -> None:
        self.evaluations += evaluations
        n = self.evaluations
        progress = {
            "stage": "prune",
            "done": n,
            "total": 1600,
            "ratio": n / 1600,
            "seconds_left": 0.9 * (1600 - n),
        }
        best = {"fitness": 0.912 - 0.35 * math.exp(-(n // 40) * 40 / 420), "stage": "prune"}
        cost = {
            "cpu_seconds": 0.21 * n,
            "engine_seconds": 0.44 * n,
            "tokens": 19200 * n,
            "evaluations": n,
        }
        self.found[0] = replace(self.found[0], progress=progress, best=best, cost=cost)

    async def newest(self) -> list[Job]:
        return self.found


@dataclass
class World:
    """The app, and what is behind it."""

    control: DashboardControl
    experiments: FakeExperiments
    jobs: FakeJobs
    app: FastAPI


def world(folder: Path, *, empty: bool = False, every: float = 0.02) -> World:
    """The app over made-up parts.

    Args:
        folder: for its files.
        empty: a server that has only just started.
        every: seconds between two polls of its stream of events.
    """
    control, experiments, jobs = DashboardControl(), FakeExperiments(), FakeJobs()
    if empty:
        control.known = [variant("full", control.plans["full"], is_alias=True)]
        control.made, jobs.found = {}, []
    else:
        experiments.found = {"halve": running(75), "quarter": rolled_back()}
    app = make_app(
        control,
        keys=lambda: [key_digest(KEY)],
        audit=AuditLog(Store(folder, "m")),
        roots=[folder],
        jobs=cast("JobService", jobs),
        experiments=cast("ExperimentService", experiments),
    )
    app.state.events._every = every
    return World(control, experiments, jobs, app)
