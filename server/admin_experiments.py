"""Routes of the admin API about experiments, and clients' scores of answers."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Path, Request, Response

from liveprune.pruning.errors import IncompatibleEnvironmentError
from liveprune.server.admin_changes import Admin
from liveprune.server.experiment_models import (
    CheckedExperiment,
    DecisionBody,
    DecisionList,
    DecisionRecord,
    ExperimentBody,
    ExperimentList,
    Feedback,
    FeedbackBody,
    Stop,
    Weights,
)
from liveprune.server.experiment_service import ExperimentService

router = APIRouter()


def _admin(request: Request) -> Admin:
    admin: Admin = request.app.state.admin
    return admin


def _experiments(request: Request) -> ExperimentService:
    found = _admin(request).experiments
    if found is None:
        raise IncompatibleEnvironmentError(
            "this server cannot run experiments: its variants need restarts (rebuild mode), or it "
            "has no store"
        )
    return found


AdminDependency = Annotated[Admin, Depends(_admin)]
Experiments = Annotated[ExperimentService, Depends(_experiments)]
Definition = Annotated[
    dict[str, Any],
    Body(
        description="See docs/experiments.md. `model` may be left out: it is the first name that "
        "the server gives its model.",
        examples=[
            {
                "name": "halve",
                "arms": [
                    {"name": "full", "variant": "full", "weight": 0.9},
                    {"name": "pruned", "variant": "e4k1", "weight": 0.1},
                ],
                "control": "full",
                "primary": {"metric": "e2e_seconds", "statistic": "p95"},
                "guardrails": [{"metric": "loop", "margin": 0.01}],
            }
        ],
    ),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="A repeated request with the same key gets the first one's experiment.",
    ),
]


@router.post("/experiments", status_code=201)
async def start_experiment(
    definition: Definition,
    admin: AdminDependency,
    experiments: Experiments,
    request: Request,
    response: Response,
    key: IdempotencyKey = None,
) -> ExperimentBody:
    """Start an experiment, or schedule it where its `start` lies in the future."""
    found = await admin.recorded(
        request,
        {"definition": definition, "idempotency_key": key},
        lambda: experiments.start(definition, key=key),
        lambda experiment: experiment.name,
        status=201,
    )
    response.headers["Location"] = f"/admin/v1/experiments/{found.name}"
    return found


@router.post("/experiments/check")
async def check_experiment(definition: Definition, experiments: Experiments) -> CheckedExperiment:
    """What would be started, with all defaults; errors are those of a start."""
    found = await experiments.check(definition)
    return CheckedExperiment(definition=found.to_json())


@router.get("/experiments")
async def list_experiments(experiments: Experiments) -> ExperimentList:
    """The newest 100 experiments, ended ones included."""
    return ExperimentList(experiments=await experiments.newest())


@router.get("/experiments/{name}")
async def get_experiment(name: str, experiments: Experiments) -> ExperimentBody:
    """One experiment, with what all replicas have measured."""
    return await experiments.get(name)


@router.patch("/experiments/{name}/weights")
async def set_weights(
    name: str, body: Weights, admin: AdminDependency, experiments: Experiments, request: Request
) -> ExperimentBody:
    """Change the shares: as few units as possible move, and a new phase begins."""
    return await admin.recorded(
        request,
        {"experiment": name, **body.model_dump()},
        lambda: experiments.move(name, body.weights),
        lambda experiment: experiment.name,
        status=200,
    )


@router.post("/experiments/{name}/stop")
async def stop_experiment(
    name: str, body: Stop, admin: AdminDependency, experiments: Experiments, request: Request
) -> ExperimentBody:
    """End an experiment; its units get what the alias serves."""
    return await admin.recorded(
        request,
        {"experiment": name, **body.model_dump()},
        lambda: experiments.stop(name, body.reason),
        lambda experiment: experiment.name,
        status=200,
    )


@router.get("/experiments/{name}/decision")
async def get_newest_decision(name: str, experiments: Experiments) -> DecisionBody:
    """The newest decision."""
    return await experiments.decision(name)


@router.get("/experiments/{name}/decisions")
async def list_decisions(name: str, experiments: Experiments) -> DecisionList:
    """Decisions; those that said nothing new are thinned out."""
    return DecisionList(decisions=await experiments.decisions(name))


@router.get("/experiments/{name}/decisions/{number}")
async def get_decision(
    name: str, number: Annotated[int, Path(ge=0, lt=1 << 63)], experiments: Experiments
) -> DecisionRecord:
    """One decision with the numbers that it follows from."""
    return await experiments.decision_record(name, number)


@router.post("/feedback")
async def give_feedback(body: Feedback, experiments: Experiments) -> FeedbackBody:
    """Count a client's score of an answer; each answer is scored once."""
    return await experiments.feedback(body.response_id, body.score)
