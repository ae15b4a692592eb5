"""Bodies of the admin API about experiments: what requests may hold and what answers do hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from liveprune.server.admin_models import Body

ExperimentState = Literal["scheduled", "running", "stopped", "shipped", "rolled_back"]


class FindingBody(Body):
    """What is proven about one measure of one treatment arm."""

    arm: str
    measure: str
    role: Literal["primary", "guardrail"]
    state: Literal["better", "within", "worse", "unclear", "no data"]
    control: float | None
    treatment: float | None
    lower: float | None
    """Bounds of treatment minus control (for a relative margin: minus control times one plus the
    margin); null: unbounded."""
    upper: float | None
    limit: float
    """What the bounds are compared with."""
    count: int
    """Values in the smaller arm."""


class DecisionBody(Body):
    """One look at an experiment, and what followed."""

    id: int
    time: float
    """Seconds since 1970."""
    verdict: Literal["INVALID", "ROLLBACK", "SHIP", "HOLD"]
    arm: str | None
    """Who is rolled back or shipped."""
    reasons: list[str]
    actions: list[str]
    """Carried out."""
    withheld: list[str]
    """Would have been, but for the dry run or the cool-down."""
    mismatch_p: float
    findings: list[FindingBody]


class DecisionRecord(DecisionBody):
    """A decision with the numbers that it follows from."""

    record: dict[str, Any]
    """``server.experiments.decision.replay`` gives the same decision of it."""


class DecisionList(Body):
    """The oldest first."""

    decisions: list[DecisionBody]


class MetricBody(Body):
    """One metric of one arm, over all phases and replicas; quantiles where they are kept."""

    count: int
    mean: float
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class ArmBody(Body):
    """One arm."""

    name: str
    variant: str
    """Tag."""
    share: float
    """Now."""
    shadow: bool
    units: int
    """Distinct ones; estimated above 32,768 a phase."""
    requests: int
    """Measured."""
    metrics: dict[str, MetricBody]


class ExperimentBody(Body):
    """One experiment."""

    name: str
    state: ExperimentState
    definition: dict[str, Any]
    """As it was given, with all defaults."""
    created: float
    """Seconds since 1970."""
    started: float | None
    ended: float | None
    reason: str | None
    """Why it ended."""
    paused: str | None
    """Why this replica routes nothing by it, e.g. a variant that is not live here."""
    phase: int
    """Changes of shares since the start."""
    phase_started: float | None
    arms: list[ArmBody]
    decision: DecisionBody | None
    """The newest."""


class ExperimentList(Body):
    """The newest first."""

    experiments: list[ExperimentBody]


class CheckedExperiment(Body):
    """What would run."""

    definition: dict[str, Any]
    """With all defaults."""


class Weights(Body):
    """New shares, of all arms; they sum to 1."""

    weights: dict[str, Annotated[float, Field(ge=0, le=1)]]


class Stop(Body):
    """End an experiment; its units get what the alias serves."""

    reason: str = ""


class Feedback(Body):
    """A client's score of an answer."""

    response_id: Annotated[str, Field(min_length=1, max_length=255, examples=["chatcmpl-3b1f"])]
    """``id`` of the answer."""
    score: Annotated[float, Field(ge=0, le=1)]
    """1 is best."""


class FeedbackBody(Body):
    """Where a score was counted."""

    experiment: str
    arm: str
