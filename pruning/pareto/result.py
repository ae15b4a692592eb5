"""What a grid of plans came to, and its form in JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from liveprune.pruning.pareto.grid import GridPoint, Skipped
from liveprune.pruning.pareto.resident import ResidentBytes
from liveprune.pruning.pareto.timing import Speed, Workload
from liveprune.pruning.search.evaluator import Cost
from liveprune.pruning.search.result import Difference, Score

FORMAT = 1


@dataclass(frozen=True)
class Measured:
    """What is known of one plan, or of the full model."""

    bytes: ResidentBytes
    score: Score
    """Over the rows of all files together."""
    tasks: Mapping[str, Score]
    """By file."""
    speed: Speed | None
    speed_failure: str | None
    on_front: bool
    against: Mapping[str, Difference] = field(default_factory=dict)
    """By the other, on the same rows: ``full``; ``random``, the mean over its seeds, and
    ``frequency`` under the same budget and top-k. Absent where there is no such plan, or it is
    that plan itself."""


@dataclass(frozen=True)
class Point:
    """One point of the grid; ``measured`` or ``failure`` is set."""

    asked: GridPoint
    digest: str | None
    """Of the plan; None where it could not be made."""
    kept: tuple[int, ...]
    """Experts after the plan, by layer."""
    top_k: tuple[int, ...]
    """Active experts, by layer."""
    measured: Measured | None
    failure: str | None
    """Why there is no plan, or no score."""
    same_as: str | None
    """The first point with the same plan, or ``full``; None if this is it."""


@dataclass(frozen=True)
class Chance:
    """A control that draws, over its seeds, under one budget and top-k."""

    experts: str
    top_k: int | None
    method: str
    means: tuple[float, ...]
    """Mean score of each seed that could be scored."""
    mean: float
    deviation: float | None
    """Standard deviation over the seeds; None with one."""


@dataclass(frozen=True, eq=False)
class ParetoResult:
    """Everything that a report says about a grid."""

    model: str
    fingerprint: str
    arguments: Mapping[str, Any]
    engine: str
    measure: str
    data: Mapping[str, Mapping[str, Any]]
    workload: Workload | None
    untimed: str
    """Why nothing was timed; empty where it was."""
    full: Measured
    experts: tuple[int, ...]
    """Of the full model, by layer."""
    points: tuple[Point, ...]
    chance: tuple[Chance, ...]
    skipped: tuple[Skipped, ...]
    versions: Mapping[str, str]
    cost: Cost

    @property
    def front(self) -> tuple[Point, ...]:
        """The plans on the front, each once, in the grid's order."""
        return tuple(
            x
            for x in self.points
            if x.measured is not None and x.measured.on_front and x.same_as is None
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without infinities or NaN; the keys are in docs/pareto.md."""
        workload = self.workload
        return {
            "format": FORMAT,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "arguments": dict(self.arguments),
            "engine": self.engine,
            "measure": self.measure,
            "data": {name: dict(about) for name, about in self.data.items()},
            "timing": {
                "left_out": self.untimed or None,
                "workload": None if workload is None else workload.to_json(),
            },
            "full": {"experts": list(self.experts), **_measured(self.full)},
            "points": [_point(x) for x in self.points],
            "front": [x.asked.name for x in self.front],
            "chance": [dataclasses.asdict(x) for x in self.chance],
            "skipped": [dataclasses.asdict(x) for x in self.skipped],
            "versions": dict(self.versions),
            "cost": dataclasses.asdict(self.cost),
        }


def _point(point: Point) -> dict[str, Any]:
    asked, measured = point.asked, point.measured
    return {
        "name": asked.name,
        "method": asked.method,
        "experts": asked.experts,
        "asked_top_k": asked.top_k,
        "seed": asked.seed,
        "control": asked.control,
        "plan": None if point.digest is None else f"plans/{asked.name}.json",
        "digest": point.digest,
        "same_as": point.same_as,
        "kept": list(point.kept),
        "top_k": list(point.top_k),
        "failure": point.failure,
        **({} if measured is None else _measured(measured)),
    }


def _measured(measured: Measured) -> dict[str, Any]:
    form = dataclasses.asdict(measured)
    form["bytes"]["total"] = measured.bytes.total
    return form


def chance(means: Sequence[float], asked: GridPoint) -> Chance:
    """Of one control's seeds; at least one."""
    mean = sum(means) / len(means)
    deviation = None
    if len(means) > 1:
        deviation = (sum((x - mean) ** 2 for x in means) / (len(means) - 1)) ** 0.5
    return Chance(asked.experts, asked.top_k, asked.method, tuple(means), mean, deviation)
