"""What a search found, and its form in JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from liveprune.pruning.evaluation.intervals import mean_interval, paired_difference
from liveprune.pruning.plan import Plan
from liveprune.pruning.search.candidate import Candidate, Values
from liveprune.pruning.search.evaluator import Cost, Failure

FORMAT = 1


@dataclass(frozen=True)
class Score:
    """Mean fitness on one set of rows with its 95 % interval; None where scoring failed."""

    n: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    failure: str | None = None

    @classmethod
    def of(cls, values: Values | Failure, n: int) -> Score:
        if isinstance(values, Failure):
            return cls(n, failure=values.message)
        interval = mean_interval(values)
        return cls(n, float(values.mean()), interval.low, interval.high)

    def __str__(self) -> str:
        """Per cent with the interval, or why there is none."""
        if self.mean is None or self.low is None or self.high is None:
            return f"failed: {self.failure}"
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Difference:
    """How far the winner is ahead of another on the same rows, with a 95 % interval."""

    difference: float
    low: float
    high: float
    z: float | None
    """In standard errors; None where all rows differ alike and there is no error."""

    @classmethod
    def of(cls, winner: Values, other: Values) -> Difference:
        paired = paired_difference(winner, other)
        z = paired.z if math.isfinite(paired.z) else None
        return cls(paired.difference, paired.interval.low, paired.interval.high, z)


@dataclass(frozen=True)
class Finalist:
    """A candidate that was scored again on dev."""

    index: int
    train: float
    dev: float


@dataclass(frozen=True, eq=False)
class StageResult:
    """The outcome of the prune or the merge stage."""

    name: str
    winner: int
    """Index of the candidate that won; it may be one of an earlier stage."""
    plan: Plan
    scores: Mapping[str, Score]
    """By ``train``, ``dev``, ``test``."""
    finalists: tuple[Finalist, ...]
    """Best first by dev score."""
    differences: Mapping[str, Mapping[str, Difference]]
    """By set of rows, then by the other: ``full``, on dev also ``runner_up`` and ``train_best``;
    of the merge stage also ``prune``. Absent where the winner is that candidate itself."""


@dataclass(frozen=True)
class CurvePoint:
    """One candidate of the search."""

    index: int
    stage: str
    mean: float | None
    """Mean fitness over ``rows``; None where it failed."""
    rows: int
    state: str
    """``complete``, ``dropped`` (in a race) or ``failed``."""
    best: float | None
    """Best mean of a complete candidate up to here."""
    failure: str | None = None


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Everything that a report says about a search."""

    model: str
    fingerprint: str
    seed: int
    parameters: Mapping[str, Any]
    versions: Mapping[str, str]
    data: Mapping[str, Mapping[str, Any]]
    groups: tuple[tuple[int, ...], ...]
    full: Mapping[str, Score]
    """The full model's scores by ``train``, ``dev``, ``test``."""
    stages: tuple[StageResult, ...]
    curve: tuple[CurvePoint, ...]
    cost: Cost

    @property
    def plan(self) -> Plan:
        """The last stage's winner."""
        return self.stages[-1].plan

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without infinities or NaN.

        Keys: ``format``, ``method``, ``model`` (a name), ``fingerprint`` (of the checkpoint),
        ``seed``, ``parameters`` (``Settings``, ``experts``, ``top_k``, ``literal``, ``starts``:
        digests of given candidates by name, ``engine``), ``versions``, ``data`` (by set: ``rows``,
        ``digest`` of the task, ``measure``), ``groups`` (layer indices that share coefficients),
        ``full`` (by set a ``Score``), ``stages`` (fields of ``StageResult``, but instead of
        ``plan`` its ``digest`` and ``layers``: per layer ``layer``, ``experts``, ``top_k``,
        ``kept`` ids or null, ``merge`` and ``router_map`` [kept][experts] or null), ``curve``
        (``CurvePoint``), ``cost`` (``Cost``).
        """
        return {
            "format": FORMAT,
            "method": "eep",
            "model": self.model,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "parameters": dict(self.parameters),
            "versions": dict(self.versions),
            "data": {name: dict(about) for name, about in self.data.items()},
            "groups": [list(group) for group in self.groups],
            "full": {name: dataclasses.asdict(score) for name, score in self.full.items()},
            "stages": [_stage_to_json(stage) for stage in self.stages],
            "curve": [dataclasses.asdict(point) for point in self.curve],
            "cost": dataclasses.asdict(self.cost),
        }


def curve_of(population: list[Candidate]) -> tuple[CurvePoint, ...]:
    """Every candidate in its order, with the best so far."""
    points = []
    best: float | None = None
    for x in population:
        if x.complete and (best is None or x.mean > best):
            best = x.mean
        state = "complete" if x.complete else "dropped" if x.dropped else "failed"
        mean = None if x.failure is not None else x.mean
        points.append(CurvePoint(x.index, x.stage, mean, len(x.values), state, best, x.failure))
    return tuple(points)


def _stage_to_json(stage: StageResult) -> dict[str, Any]:
    return {
        "name": stage.name,
        "winner": stage.winner,
        "digest": stage.plan.digest,
        "layers": [
            {
                "layer": x.layer,
                "experts": x.experts,
                "top_k": x.top_k,
                "kept": list(x.kept) or None,
                "merge": None if x.merge is None else x.merge.tolist(),
                "router_map": None if x.router_map is None else x.router_map.tolist(),
            }
            for x in stage.plan.layers
        ],
        "scores": {name: dataclasses.asdict(score) for name, score in stage.scores.items()},
        "finalists": [dataclasses.asdict(x) for x in stage.finalists],
        "differences": {
            rows: {name: dataclasses.asdict(x) for name, x in others.items()}
            for rows, others in stage.differences.items()
        },
    }
