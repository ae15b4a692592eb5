"""A grid of plans, made, scored and timed; killed and run again, it goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.errors import (
    ConflictError,
    DataError,
    EngineError,
    IncompatibleEnvironmentError,
)
from liveprune.pruning.evaluation.engine import Engine
from liveprune.pruning.model_name import model_name
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.pareto import timing
from liveprune.pruning.pareto.grid import Grid, GridPoint
from liveprune.pruning.pareto.points import Answer, Answers, assemble
from liveprune.pruning.pareto.resident import ModelBytes
from liveprune.pruning.pareto.result import ParetoResult
from liveprune.pruning.pareto.timing import Sample, Workload
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_guards import check_plan
from liveprune.pruning.plan_io import load_plan, save_plan
from liveprune.pruning.prune import installed_versions
from liveprune.pruning.search.evaluator import Evaluator, Failure, SearchCancelledError
from liveprune.pruning.search.journal import Entry, Journal, open_folder
from liveprune.pruning.search.row_sets import RowSet
from liveprune.pruning.search.run import Progress

if TYPE_CHECKING:
    from liveprune.pruning.evaluation.task import Task
    from liveprune.pruning.search.candidate import Values

PLANS_PER_CALL = 16
"""Scored in one call of the engine, which is what is lost when the run is killed in it."""
_ENDS = (SearchCancelledError, ConflictError, IncompatibleEnvironmentError, OSError)
"""What is no fault of the method that was at work."""

Maker = Callable[[GridPoint], Plan]


def run_pareto(
    model: Path,
    spec: ModelSpec,
    engine: Engine,
    *,
    grid: Grid,
    make: Maker,
    tasks: Mapping[str, Task],
    folder: Path,
    arguments: Mapping[str, Any],
    engine_name: str,
    workload: Workload | None,
    untimed: str = "",
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> ParetoResult:
    """Make the grid's plans, score them and time them.

    A plan that cannot be made, scored or timed is a point with a message. Called again with the
    same arguments it goes on where it stopped, however that was.

    Args:
        model: the checkpoint's folder.
        spec: of that checkpoint.
        engine: scores and generates under plans of that checkpoint.
        grid: what is run.
        make: makes the plan of a point; equal points must give equal plans.
        tasks: rows, by the name of their file; all by one measure.
        folder: where plans and answers are kept; new or empty at first.
        arguments: everything else that the plans hang on, in JSON's types.
        engine_name: what computes, and in which dtype.
        workload: what is timed; None times nothing.
        untimed: why nothing is timed, though there may be a workload: the same call without the
            reason goes on and times it.
        progress: called after each plan, call and timing.
        cancel: once set, the run stops before its next step.

    Raises:
        DataError: the folder holds another run; the message names what differs. Or a plan's file
            has changed.
        ConflictError: another process uses the folder.
        EngineError: the engine fails on the full model.
        SearchCancelledError: ``cancel`` was set.
        CheckpointError: the checkpoint cannot be read.
    """
    weights = fingerprint_model(model)
    sizes = ModelBytes(model, spec)
    data = {
        name: {"rows": task.size, "digest": task.digest, "measure": task.measure}
        for name, task in tasks.items()
    }
    identity = {
        "model": weights,
        "data": data,
        "arguments": dict(arguments),
        "engine": engine_name,
        "points": [point.name for point in grid.points],
        "timing": None if workload is None else workload.to_json(),
    }
    timed = None if untimed else workload
    with open_folder(folder, identity, "pareto") as journal:
        run = _Run(spec, engine, journal, tasks, timed, progress, cancel)
        plans = run.plans(grid.points, make, folder / "plans")
        distinct = list({x.digest: x for x in plans.values() if isinstance(x, Plan)}.values())
        full, values = run.scores(distinct)
        scored = [plan for plan in distinct if not isinstance(values[plan.digest], Failure)]
        samples = run.timings(scored)
        run.report("done", 1, 1)
        cost = run.evaluator.cost
    answers = Answers(plans, full, values, samples)
    found = assemble(grid.points, answers, spec, sizes, timed)
    return ParetoResult(
        model=model_name(model),
        fingerprint=weights,
        arguments=dict(arguments),
        engine=engine_name,
        measure=next(iter(tasks.values())).measure,
        data=data,
        workload=timed,
        untimed=untimed,
        full=found.full,
        experts=tuple(layer.experts for layer in spec.layers),
        points=found.points,
        chance=found.chance,
        skipped=grid.skipped,
        versions=installed_versions(),
        cost=cost,
    )


class _Run:
    """The steps of one run, each kept in the journal before the next."""

    def __init__(
        self,
        spec: ModelSpec,
        engine: Engine,
        journal: Journal,
        tasks: Mapping[str, Task],
        workload: Workload | None,
        progress: Callable[[Progress], None] | None,
        cancel: threading.Event | None,
    ) -> None:
        self.evaluator = Evaluator(engine, journal, cancel)
        self._spec = spec
        self._engine = engine
        self._journal = journal
        self._sets = [RowSet(name, task, tuple(range(task.size))) for name, task in tasks.items()]
        self._workload = workload
        self._progress = progress

    def report(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(Progress(stage, done, total, None, self._journal.replaying))

    def plans(self, points: Sequence[GridPoint], make: Maker, folder: Path) -> dict[str, Answer]:
        """By name; each is in its file before the journal says so."""
        found: dict[str, Answer] = {}
        for place, point in enumerate(points):
            self.report("plans", place, len(points))
            path = folder / f"{point.name}.json"
            entry = self._timed({"plan": point.name}, partial(self._make, point, make, path))
            if "error" in entry:
                found[point.name] = Failure(entry["error"])
                continue
            plan = load_plan(path)
            if plan.digest != entry["digest"]:
                raise DataError(
                    f"{path}: found the plan {plan.digest}, expected {entry['digest']} as it was "
                    f"made; start anew in an empty folder"
                )
            found[point.name] = plan
        return found

    def _make(self, point: GridPoint, make: Maker, path: Path) -> Entry:
        try:
            plan = make(point)
            check_plan(plan, self._spec)
        except _ENDS:
            raise
        except Exception as error:  # noqa: BLE001 - methods are anyone's code; the others go on
            if isinstance(error, EngineError):
                self.evaluator.check_alive(self._sets[0], error)
            name = "" if str(error) else type(error).__name__
            return {"error": f"{error}{name}"}
        save_plan(plan, path)
        return {"digest": plan.digest}

    def scores(
        self, plans: Sequence[Plan]
    ) -> tuple[dict[str, Values], dict[str, dict[str, Values] | Failure]]:
        """Of the full model by file, and of plans by digest."""
        full: dict[str, Values] = {}
        for rows in self._sets:  # first, so that an engine that cannot run is found out
            self.report("scores", 0, len(plans))
            (values,) = self.evaluator.score(rows, [None])
            if isinstance(values, Failure):
                raise EngineError(
                    f"the full model cannot be scored on {rows.name}: {values.message}"
                )
            full[rows.name] = values
        found: dict[str, dict[str, Values] | Failure] = {}
        for start in range(0, len(plans), PLANS_PER_CALL):
            some = plans[start : start + PLANS_PER_CALL]
            by_rows = {rows.name: self.evaluator.score(rows, some) for rows in self._sets}
            for place, plan in enumerate(some):
                found[plan.digest] = _whole({name: x[place] for name, x in by_rows.items()})
            self.report("scores", start + len(some), len(plans))
        return full, found

    def timings(self, plans: Sequence[Plan]) -> dict[str, Sample | Failure]:
        """By digest; empty where nothing is timed."""
        workload = self._workload
        if workload is None:
            return {}
        found: dict[str, Sample | Failure] = {}
        for place, plan in enumerate(plans):
            self.report("speed", place, len(plans))
            entry = self._timed({"time": plan.digest}, partial(self._measure, plan, workload))
            failed = "error" in entry
            found[plan.digest] = Failure(entry["error"]) if failed else entry["sample"]
        return found

    def _measure(self, plan: Plan, workload: Workload) -> Entry:
        try:
            return {"sample": timing.measure(self._engine, plan, workload)}
        except EngineError as error:
            self.evaluator.check_alive(self._sets[0], error)
            return {"error": str(error)}

    def _timed(self, request: Entry, ask: Callable[[], Entry]) -> Entry:
        """One step through the journal, with what it cost."""

        def run() -> Entry:
            self.evaluator.check_cancelled()
            wall, cpu = time.perf_counter(), time.process_time()
            entry = ask()
            entry["wall_seconds"] = round(time.perf_counter() - wall, 6)
            entry["cpu_seconds"] = round(time.process_time() - cpu, 6)
            return entry

        entry = self._journal.call(request, run)
        self.evaluator.cost.wall_seconds += entry["wall_seconds"]
        self.evaluator.cost.cpu_seconds += entry["cpu_seconds"]
        return entry


def _whole(by_rows: Mapping[str, Values | Failure]) -> dict[str, Values] | Failure:
    """Values of every file, or the first failure."""
    found: dict[str, Values] = {}
    for name, values in by_rows.items():
        if isinstance(values, Failure):
            return Failure(f"{name}: {values.message}")
        found[name] = np.asarray(values)
    return found
