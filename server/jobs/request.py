"""What a job is asked for: the body of ``POST /admin/v1/jobs``, and what the store keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from liveprune.pruning.calibration.rows import MAX_ROWS
from liveprune.pruning.evaluation.task import MAX_ANSWER_TOKENS

SEARCH = "eep"
EVOESAP = "evoesap"
ONE_PASS = (
    *("target_memory", "allocate", "min_experts", "max_experts", "snap", "expert_parallel"),
    *("router", "skip_layers", "keep_super_experts"),
)
"""What only one-pass methods have."""
FileName = Annotated[str, Field(min_length=1, max_length=4096)]
Count = Annotated[int, Field(ge=1)]


class Frozen(BaseModel):
    """An unknown field is an error; values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Source(Frozen):
    """What a job learns from: exactly one of these."""

    data: FileName | None = None
    """JSONL rows, as ``--calibration`` or ``--train`` of ``liveprune prune``: a path on the server,
    inside an allowed folder."""
    statistics: Literal["live"] | None = None
    """What the engine counted while it served (docs/live-calibration.md)."""
    prompts: Literal["kept"] | None = None
    """Prompts of users, where the server was told to keep some."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        named = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(named) != 1:
            found = " and ".join(named) or "none"
            raise ValueError(f"found {found}, expected one of data, statistics and prompts")
        return self


class JobRequest(Frozen):
    """One background pruning run: method + data + budget -> plan -> variant."""

    method: Annotated[str, Field(min_length=1, examples=["reap", SEARCH])]
    source: Source
    tag: Annotated[str, Field(min_length=1, max_length=256, examples=["e4"])]
    """Of the variant that the result becomes."""
    experts: str | Annotated[list[Count], Field(min_length=1)] | None = None
    """Budget: as ``--experts`` of ``liveprune prune``."""
    target_memory: Count | None = None
    """Instead of ``experts``: bytes of all weights. Not for ``eep``."""
    top_k: Count | Annotated[list[Count], Field(min_length=1)] | None = None
    """Active experts; null keeps the model's."""
    allocate: Literal["uniform", "global", "evoesap"] | None = None
    """How one-pass methods share the budget out; null is the method's own way. ``evoesap`` is a
    search for counts by layer over the method's ranking; its parameters stand in ``settings``."""
    min_experts: Count | None = None
    """Fewest that a layer is left with by one total."""
    max_experts: Count | None = None
    """Most that a layer keeps of one total."""
    snap: str | None = None
    """Lower counts to servable ones, tuned ones, or multiples of a number; as ``--snap``."""
    expert_parallel: Count = 1
    """Ranks that must be able to share the counts; with ``snap``."""
    router: Literal["keep", "drop"] | None = None
    """Methods that merge: keep all gate rows, or drop those of experts that are gone."""
    skip_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers to leave whole."""
    keep_super_experts: bool = False
    """Never prune experts with outlying activations."""
    seed: Annotated[int, Field(ge=0)] = 0
    settings: Mapping[str, Any] = Field(default_factory=dict)
    """The method's own parameters; of ``eep`` those of ``pruning.search.presets.Settings``."""
    preset: str = "liveprune"
    """Of ``eep``: where its other parameters are from."""
    measure: str | None = None
    """Null takes the one that the rows' form asks for: exact, choice, else esap."""
    dev: FileName | None = None
    """Rows that winners are chosen on and results are measured on; null puts a part of the source's
    rows aside."""
    test: FileName | None = None
    """Rows measured once, at the end; never those that a job learns from."""
    chat: bool = False
    """Put prompts through the chat template, each as a user's turn."""
    max_rows: Count = MAX_ROWS
    """Rows used of each file."""
    max_answer_tokens: Count = MAX_ANSWER_TOKENS
    engine: Literal["live", "transformers", "vllm"] = "live"
    """What scores plans: the serving engine, below user traffic, or one of the job's own."""
    actors: Count | None = None
    """So many engines of its own, each in an actor of Ray."""
    ray_address: str | None = None
    """Of a running Ray cluster; null starts one on the server's machine."""
    make_live: bool = False
    """Make the variant live when it is found; nothing routes to it yet but its own name."""
    share: Annotated[float, Field(ge=0.1, le=1.0)] = 0.5
    """Of the serving engine's time, at most."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.experts is None) == (self.target_memory is None) and "tau" not in self.settings:
            found = "both" if self.experts is not None else "neither"
            raise ValueError(f"found {found} of experts and target_memory, expected one")
        if self.actors is not None and self.engine == "live":
            raise ValueError("actors: found with engine live, expected transformers or vllm")
        if self.ray_address is not None and self.actors is None:
            raise ValueError("ray_address: found without actors, expected their number")
        return self

    @property
    def searches(self) -> bool:
        """Many candidates are scored; else one pass gives the plan."""
        return self.method == SEARCH

    @property
    def searches_budgets(self) -> bool:
        """One pass ranks the experts, and a search says how many each layer keeps."""
        return self.allocate == EVOESAP and not self.searches

    @property
    def learns_from_answers(self) -> bool:
        """The source's rows are scored, not only read."""
        return self.searches or self.searches_budgets


class StoredRequest(Frozen):
    """What the store keeps of a request that was accepted."""

    request: JobRequest
    """Paths are absolute."""
    asked: Mapping[str, Any] = Field(default_factory=dict)
    """As it came."""
    digests: Mapping[str, str] = Field(default_factory=dict)
    """Of each file's content, by ``data``, ``dev``, ``test``: a job goes on with the same rows or
    not at all."""
    key: str | None = None
    """The idempotency key that it came with."""
    who: str = ""
    """Fingerprint of the admin key that asked."""
