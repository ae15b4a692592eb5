"""Routes of the admin API that try plans out; they change nothing, so the audit log has none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter, Request

from liveprune.pruning.errors import LiveprunError, PlanError
from liveprune.pruning.plan import Plan
from liveprune.server.candidate_models import (
    Generate,
    GenerateAnswer,
    GeneratedBody,
    PlanBody,
    Score,
    ScoreAnswer,
    ScoresBody,
)
from liveprune.server.control_plane import ControlPlane

router = APIRouter()


@router.post("/score")
async def score_candidates(body: Score, request: Request) -> ScoreAnswer:
    """Score answers under plans, below user traffic; nobody else sees these plans."""
    control: ControlPlane = request.app.state.admin.control
    plans = await asyncio.to_thread(_plans, body.plans)
    rows = [row.row() for row in body.rows]
    found = await control.candidates.score(plans, rows, against_full=body.against_full)
    return ScoreAnswer(scores=[ScoresBody.of(scores) for scores in found])


@router.post("/generate")
async def generate_with_candidates(body: Generate, request: Request) -> GenerateAnswer:
    """Decode greedily under plans, below user traffic; nobody else sees these plans."""
    control: ControlPlane = request.app.state.admin.control
    plans = await asyncio.to_thread(_plans, body.plans)
    prompts = [tuple(prompt) for prompt in body.prompts]
    found = await control.candidates.generate(
        plans, prompts, max_tokens=body.max_tokens, end=frozenset(body.end)
    )
    return GenerateAnswer(generated=[GeneratedBody.of(answers) for answers in found])


def _plans(bodies: Sequence[PlanBody | None]) -> list[Plan | None]:
    plans: list[Plan | None] = []
    for i, body in enumerate(bodies):
        try:
            plans.append(None if body is None else body.plan())
        except LiveprunError as error:
            raise PlanError(f"plans.{i}: {error}") from error
    return plans
