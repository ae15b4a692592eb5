"""Bodies of the admin API: what requests may hold and what answers do hold.

The answers mirror ``operations.py``; an unknown field is an error on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from liveprune.server.layer_views import LayerView
from liveprune.server.operations import Operation, State, Status, VariantView

Name = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        description="Tag of a variant, or its full name `name:tag`.",
        examples=["e4k1"],
    ),
]


class Body(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class AddVariant(Body):
    """Make a plan live under a new name."""

    tag: Name
    plan: Annotated[str, Field(min_length=1, max_length=4096, examples=["plans/e4k1.json"])]
    """Path on the server, inside an allowed folder: a plan file or a pruned checkpoint's folder."""


class Swap(Body):
    """Send the requests of the bare name to another variant."""

    variant: Name
    keep_previous: bool = False
    """Keep the rows of the variant before resident, so that a roll-back reads nothing."""


class Progress(Body):
    """Bytes of expert rows made resident."""

    bytes_done: int
    bytes_total: int


class OperationBody(Body):
    """One change, from request to end."""

    id: str
    kind: str
    """`add`, `remove`, `swap` or `rollback`; `score` or `generate` while candidates answer."""
    variant: str
    state: State
    progress: Progress
    freed_bytes: int
    error: str | None
    """Why it failed."""
    created: float
    """Seconds since 1970."""
    finished: float | None
    seconds: dict[str, float]
    """Time spent in each state."""
    notes: list[str]
    """What an operator should know."""

    @classmethod
    def of(cls, operation: Operation) -> OperationBody:
        return cls.model_validate(operation.to_json())


class OperationList(Body):
    """Operations under way and some that ended."""

    operations: list[OperationBody]


class Experts(Body):
    """Experts kept, over the layers."""

    min: int
    max: int
    total: int


class TopK(Body):
    """Active experts, over the layers."""

    min: int
    max: int


class VariantBody(Body):
    """One variant."""

    name: str
    tag: str
    digest: str | None
    """Of its plan; null for `full`."""
    state: str
    """`live`, `preparing`, `draining` or `standby`."""
    is_alias: bool
    """The bare name routes to it."""
    is_previous: bool
    """A roll-back would return to it."""
    experts: Experts
    top_k: TopK
    row_bytes: int
    """Bytes of the expert rows it needs; variants share rows."""
    in_flight: int
    """Requests that it is answering."""

    @classmethod
    def of(cls, view: VariantView) -> VariantBody:
        return cls.model_validate(view.to_json())


class VariantList(Body):
    """All variants that the server knows."""

    variants: list[VariantBody]


class LayerBody(Body):
    """What a variant leaves of one layer; a base expert that is in no list is dropped."""

    layer: int
    """Index among all decoder layers."""
    experts: int
    """Of the base model."""
    remaining: int
    """Under the variant."""
    top_k: int
    kept: list[int]
    """Base experts that there are unchanged."""
    merged: list[int]
    """Base experts that only live on as parts of merged ones."""
    constant: list[int]
    """Base experts that answer with a constant vector."""


class PlanBody(Body):
    """What a variant leaves of the base model's experts."""

    layers: list[LayerBody]

    @classmethod
    def of(cls, views: Sequence[LayerView]) -> PlanBody:
        return cls.model_validate({"layers": [view.to_json() for view in views]})


class StatusBody(Body):
    """The engine's memory, its variants and what is going on."""

    model: str
    alias: str
    previous: str | None
    ready: bool
    operation: OperationBody | None
    """The one under way."""
    expert_bytes: int
    spare_bytes: int
    other_weight_bytes: int
    kv_bytes: int
    kv_blocks: int
    kv_max_blocks: int
    process_bytes: int
    """The operating system's figure for the engine's workers."""
    memory_target_bytes: int | None
    """Bound of experts + spare + other weights + KV cache."""
    fingerprint: str
    """Of the base model's config and experts: plans are for one model. Empty in rebuild mode."""
    variants: list[VariantBody]

    @classmethod
    def of(cls, status: Status) -> StatusBody:
        return cls.model_validate(status.to_json())


class Ready(Body):
    """Whether some variant can answer."""

    ready: bool


class Alive(Body):
    """The process answers."""

    status: str


class Error(Body):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field of the request that is at fault."""
    code: int


class ErrorBody(Body):
    """Every error has this body."""

    error: Error
