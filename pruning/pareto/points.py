"""From answers to points: scores with intervals, comparisons, bytes, speeds, the front."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from liveprune.pruning.errors import EngineError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.pareto.front import Coordinates, front
from liveprune.pruning.pareto.grid import CONTROLS, GridPoint
from liveprune.pruning.pareto.resident import ModelBytes
from liveprune.pruning.pareto.result import Chance, Measured, Point, chance
from liveprune.pruning.pareto.timing import Sample, Speed, Workload, middle, speeds
from liveprune.pruning.plan import Plan
from liveprune.pruning.search.evaluator import Failure
from liveprune.pruning.search.result import Difference, Score

if TYPE_CHECKING:
    from liveprune.pruning.search.candidate import Values


FULL = "full"
"""Stands for the full model among names."""

Answer = Plan | Failure


@dataclass(frozen=True)
class Answers:
    """All that was asked: by point, and by digest of the plan."""

    plans: Mapping[str, Answer]
    full: Mapping[str, Values]
    """By file."""
    values: Mapping[str, Mapping[str, Values] | Failure]
    """By digest, then by file."""
    samples: Mapping[str, Sample | Failure]
    """By digest."""


@dataclass(frozen=True)
class Points:
    """The full model, the grid's points in order, and what chance reaches."""

    full: Measured
    points: tuple[Point, ...]
    chance: tuple[Chance, ...]


def assemble(
    asked: Sequence[GridPoint],
    answers: Answers,
    spec: ModelSpec,
    sizes: ModelBytes,
    workload: Workload | None,
) -> Points:
    """Put everything that was asked together; pure."""
    rivals = _Rivals(asked, answers)
    full = Measured(
        bytes=sizes.of(None),
        score=_score(answers.full),
        tasks={name: Score.of(values, len(values)) for name, values in answers.full.items()},
        speed=_full_speed(answers, workload),
        speed_failure=None,
        on_front=False,
    )
    first: dict[str, str] = {}
    points = []
    for point in asked:
        plan = answers.plans[point.name]
        if isinstance(plan, Failure):
            points.append(Point(point, None, (), (), None, plan.message, None))
            continue
        values = answers.values[plan.digest]
        measured = failure = None
        if isinstance(values, Failure):
            failure = values.message
        else:
            speed, speed_failure = _speed(answers, plan.digest, workload)
            measured = Measured(
                bytes=sizes.of(plan),
                score=_score(values),
                tasks={name: Score.of(x, len(x)) for name, x in values.items()},
                speed=speed,
                speed_failure=speed_failure,
                on_front=False,
                against=rivals.differences(point, _joined(values)),
            )
        earlier = first.setdefault(plan.digest, FULL if _is_full(plan, spec) else point.name)
        points.append(
            Point(
                asked=point,
                digest=plan.digest,
                kept=tuple(layer.kept_experts for layer in plan.layers),
                top_k=tuple(layer.top_k for layer in plan.layers),
                measured=measured,
                failure=failure,
                same_as=None if earlier == point.name else earlier,
            )
        )
    return _with_front(Points(full, tuple(points), rivals.chance()))


def _is_full(plan: Plan, spec: ModelSpec) -> bool:
    top_ks = [layer.top_k for layer in spec.layers]
    return all(x.is_identity for x in plan.layers) and [x.top_k for x in plan.layers] == top_ks


class _Rivals:
    """The controls, by what they have in common with a point: budget and top-k."""

    def __init__(self, asked: Sequence[GridPoint], answers: Answers) -> None:
        self._full = _joined(answers.full)
        self._controls: dict[tuple[str, int | None, str], list[tuple[GridPoint, Values]]] = {}
        for point in asked:
            plan = answers.plans[point.name]
            if point.method not in CONTROLS or isinstance(plan, Failure):
                continue
            values = answers.values[plan.digest]
            if not isinstance(values, Failure):
                key = (point.experts, point.top_k, point.method)
                self._controls.setdefault(key, []).append((point, _joined(values)))

    def differences(self, point: GridPoint, values: Values) -> dict[str, Difference]:
        found = {"full": Difference.of(values, self._full)}
        for method in CONTROLS:
            rivals = self._controls.get((point.experts, point.top_k, method), [])
            if rivals and point.method != method:
                mean = np.mean([x for _, x in rivals], axis=0)
                found[method] = Difference.of(values, mean)
        return found

    def chance(self) -> tuple[Chance, ...]:
        return tuple(
            chance([float(values.mean()) for _, values in rivals], rivals[0][0])
            for (_, _, method), rivals in self._controls.items()
            if method == "random"
        )


def _with_front(found: Points) -> Points:
    """The full model is the first candidate."""
    full = Coordinates(
        found.full.score.mean or 0.0,
        found.full.bytes.total,
        found.full.speed.decode.wall if found.full.speed else None,
    )
    measured = [x.measured for x in found.points if x.measured is not None]
    places = [
        Coordinates(x.score.mean or 0.0, x.bytes.total, x.speed.decode.wall if x.speed else None)
        for x in measured
    ]
    full_on_front, *on_front = front([full, *places])
    kept = iter(on_front)
    points = tuple(
        x
        if x.measured is None
        else dataclasses.replace(x, measured=dataclasses.replace(x.measured, on_front=next(kept)))
        for x in found.points
    )
    return Points(dataclasses.replace(found.full, on_front=full_on_front), points, found.chance)


def _speed(
    answers: Answers, digest: str, workload: Workload | None
) -> tuple[Speed | None, str | None]:
    sample = answers.samples.get(digest)
    if sample is None or workload is None:
        return None, None
    if isinstance(sample, Failure):
        return None, sample.message
    try:
        return speeds(sample, workload)["plan"], None
    except EngineError as error:
        return None, str(error)


def _full_speed(answers: Answers, workload: Workload | None) -> Speed | None:
    """The middle one of those beside the plans that could be timed; None if none could."""
    timed = [digest for digest in answers.samples if _speed(answers, digest, workload)[0]]
    samples = [answers.samples[digest] for digest in timed]
    beside = [
        speeds(sample, workload)["full"]
        for sample in samples
        if workload is not None and not isinstance(sample, Failure)
    ]
    return middle(beside) if beside else None


def _score(by_task: Mapping[str, Values]) -> Score:
    values = _joined(by_task)
    return Score.of(values, len(values))


def _joined(by_task: Mapping[str, Values]) -> Values:
    return np.concatenate(list(by_task.values()))
