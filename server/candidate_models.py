"""Bodies of ``POST /admin/v1/score`` and ``/generate``: plans, rows and answers as JSON.

A plan has the fields of a plan file (docs/plan-format.md), its matrices in the place of their
names: nested lists, or base64 of little-endian float32.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from liveprune.pruning.errors import LiveprunError, PlanError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.plan import LayerPlan, Lineage, Matrix, NeuronMap, Plan
from liveprune.pruning.plan_io import FORMAT, VERSION
from liveprune.server.admin_models import Body

MAX_PLANS = 64
MAX_ROWS = 4096
MAX_TOKENS = 1 << 20
"""Tokens of all rows under all plans, in one call; of ``generate`` the answers' at their longest
included. A call that must give way to an operation is asked again from its start."""

Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Tokens = Annotated[list[Token], Field(min_length=1)]


class MatrixBody(Body):
    """A matrix of float32, exactly."""

    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    float32: str
    """Base64 of the rows one after another, little-endian."""

    @classmethod
    def of(cls, matrix: Matrix) -> MatrixBody:
        data = np.ascontiguousarray(matrix, "<f4").tobytes()
        return cls(shape=matrix.shape, float32=base64.b64encode(data).decode("ascii"))

    def matrix(self) -> Matrix:
        """Raises PlanError where the bytes are not those of such a matrix."""
        try:
            values = np.frombuffer(base64.b64decode(self.float32, validate=True), "<f4")
            return values.reshape(self.shape).astype(np.float32)
        except ValueError as error:
            raise PlanError(f"matrix of {self.shape}: {error}") from error


class WholeNumbersBody(Body):
    """A matrix of int32, exactly."""

    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    int32: str
    """Base64 of the rows one after another, little-endian."""

    @classmethod
    def of(cls, matrix: NeuronMap) -> WholeNumbersBody:
        data = np.ascontiguousarray(matrix, "<i4").tobytes()
        return cls(shape=matrix.shape, int32=base64.b64encode(data).decode("ascii"))

    def matrix(self) -> NeuronMap:
        """Raises PlanError where the bytes are not those of such a matrix."""
        try:
            values = np.frombuffer(base64.b64decode(self.int32, validate=True), "<i4")
            return values.reshape(self.shape).astype(np.int32)
        except ValueError as error:
            raise PlanError(f"matrix of {self.shape}: {error}") from error


class LayerBody(Body):
    """One layer of a plan."""

    layer: int
    experts: int
    top_k: int
    kept: list[int] = Field(default_factory=list)
    merge: MatrixBody | list[list[float]] | None = None
    router_map: MatrixBody | list[list[float]] | None = None
    expert_map: list[int] = Field(default_factory=list)
    constants: MatrixBody | list[list[float]] | None = None
    neuron_map: WholeNumbersBody | None = None
    neuron_shares: list[float] | None = None

    @classmethod
    def of(cls, layer: LayerPlan) -> LayerBody:
        return cls(
            layer=layer.layer,
            experts=layer.experts,
            top_k=layer.top_k,
            kept=list(layer.kept),
            merge=None if layer.merge is None else MatrixBody.of(layer.merge),
            router_map=None if layer.router_map is None else MatrixBody.of(layer.router_map),
            expert_map=list(layer.expert_map),
            constants=None if layer.constants is None else MatrixBody.of(layer.constants),
            neuron_map=(
                None if layer.neuron_map is None else WholeNumbersBody.of(layer.neuron_map)
            ),
            # A float32 survives JSON's float64.
            neuron_shares=None if layer.neuron_shares is None else layer.neuron_shares.tolist(),
        )

    def plan(self) -> LayerPlan:
        """Raises PlanError where it is malformed."""
        return LayerPlan(
            layer=self.layer,
            experts=self.experts,
            top_k=self.top_k,
            kept=tuple(self.kept),
            merge=_matrix(self.merge),
            router_map=_matrix(self.router_map),
            expert_map=tuple(self.expert_map),
            constants=_matrix(self.constants),
            neuron_map=None if self.neuron_map is None else self.neuron_map.matrix(),
            neuron_shares=(None if self.neuron_shares is None else _floats(self.neuron_shares)),
        )


class PlanBody(Body):
    """A plan, as in a plan file."""

    format: Literal[FORMAT] = FORMAT  # type: ignore[valid-type]
    version: Literal[VERSION] = VERSION  # type: ignore[valid-type]
    digest: str | None = None
    """Checked where it is given."""
    architecture: str
    base_model: str = ""
    num_hidden_layers: int
    layers: list[LayerBody]
    lineage: dict[str, Any] | None = None
    """Where it comes from; makes no difference here."""

    @classmethod
    def of(cls, plan: Plan) -> PlanBody:
        return cls(
            digest=plan.digest,
            architecture=plan.architecture,
            base_model=plan.base_model,
            num_hidden_layers=plan.num_hidden_layers,
            layers=[LayerBody.of(layer) for layer in plan.layers],
        )

    def plan(self) -> Plan:
        """Raises PlanError where it is malformed, or not the one that its digest promises."""
        plan = Plan(
            architecture=self.architecture,
            num_hidden_layers=self.num_hidden_layers,
            layers=tuple(layer.plan() for layer in self.layers),
            lineage=Lineage("candidate"),
            base_model=self.base_model,
        )
        if self.digest not in (None, plan.digest):
            raise PlanError(f"plan: content has digest {plan.digest}, expected {self.digest}")
        return plan


Plans = Annotated[
    list[PlanBody | None],
    Field(min_length=1, max_length=MAX_PLANS, description="null is the full model."),
]


class RowBody(Body):
    """One question with the answer whose tokens are scored."""

    prompt: Tokens
    answer: Tokens

    def row(self) -> TokenRow:
        return TokenRow(tuple(self.prompt), tuple(self.answer))


class Score(Body):
    """Score the rows' answers, teacher-forced, under each plan."""

    plans: Plans
    rows: Annotated[list[RowBody], Field(min_length=1, max_length=MAX_ROWS)]
    against_full: bool = False
    """Also compare each distribution with the full model's."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        _check_tokens(self.plans, sum(len(row.prompt) + len(row.answer) for row in self.rows))
        return self


class ScoresBody(Body):
    """What one plan makes of all answers: one entry a token, rows one after another."""

    error: str | None = None
    """Why the plan cannot be run; then there is nothing else."""
    predicted: list[int] | None = None
    """The token that greedy decoding would give after the right ones before it."""
    logprobs: list[float | None] | None = None
    """Natural logarithm of the right token's probability; null where it is not finite."""
    overlap: list[float | None] | None = None
    """Sum over the vocabulary of min(full model's, plan's probability)."""
    divergence: list[float | None] | None = None
    """Kullback-Leibler divergence of the plan's distribution from the full model's, nats."""

    @classmethod
    def of(cls, found: AnswerScores | LiveprunError) -> ScoresBody:
        if isinstance(found, LiveprunError):
            return cls(error=str(found))
        return cls(
            predicted=found.predicted.tolist(),
            logprobs=_listed(found.logprobs),
            overlap=_listed(found.overlap),
            divergence=_listed(found.divergence),
        )

    def scores(self) -> AnswerScores:
        """The other end of ``of``, where there is no error; what was not finite is NaN."""
        logprobs = _values(self.logprobs)
        return AnswerScores(
            np.array(self.predicted, np.int64),
            np.zeros(0) if logprobs is None else logprobs,
            _values(self.overlap),
            _values(self.divergence),
        )


class ScoreAnswer(Body):
    """One for each plan."""

    scores: list[ScoresBody]


class Generate(Body):
    """Decode greedily under each plan."""

    plans: Plans
    prompts: Annotated[list[Tokens], Field(min_length=1, max_length=MAX_ROWS)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    """Most tokens of an answer."""
    end: list[Token] = Field(default_factory=list)
    """Tokens that end an answer; such a token stays its last."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        answers = len(self.prompts) * self.max_tokens
        _check_tokens(self.plans, answers + sum(map(len, self.prompts)))
        return self


class GeneratedBody(Body):
    """One plan's answers to all prompts."""

    error: str | None = None
    """Why the plan cannot be run; then there is nothing else."""
    answers: list[list[int]] | None = None

    @classmethod
    def of(cls, found: Sequence[Sequence[int]] | LiveprunError) -> GeneratedBody:
        if isinstance(found, LiveprunError):
            return cls(error=str(found))
        return cls(answers=[list(answer) for answer in found])


class GenerateAnswer(Body):
    """One for each plan."""

    generated: list[GeneratedBody]


def _check_tokens(plans: Sequence[object], tokens: int) -> None:
    if len(plans) * tokens > MAX_TOKENS:
        raise ValueError(
            f"found {len(plans)} plans x {tokens} tokens, expected at most {MAX_TOKENS} in one call"
        )


def _matrix(body: MatrixBody | list[list[float]] | None) -> Matrix | None:
    if body is None or isinstance(body, MatrixBody):
        return None if body is None else body.matrix()
    if len({len(row) for row in body}) > 1:
        raise PlanError("matrix: found rows of different lengths")
    return _floats(body)


def _floats(values: list[float] | list[list[float]]) -> npt.NDArray[np.float32]:
    try:
        with np.errstate(over="raise"):
            return np.array(values, np.float32)
    except FloatingPointError as error:
        raise PlanError("matrix: found a number that is too large, expected float32") from error


def _listed(values: npt.NDArray[np.float64] | None) -> list[float | None] | None:
    if values is None:
        return None
    return [x if math.isfinite(x) else None for x in values.tolist()]


def _values(listed: list[float | None] | None) -> npt.NDArray[np.float64] | None:
    if listed is None:
        return None
    return np.array([math.nan if x is None else x for x in listed], np.float64)
