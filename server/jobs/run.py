"""What a worker does with a job: a plan by one pass or by a search, and what it scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liveprune.pruning.errors import EngineError
from liveprune.pruning.evaluation.engine import Engine
from liveprune.pruning.evaluation.task import Task, load_task
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from liveprune.pruning.prune import make_plan
from liveprune.pruning.search.budget_search import EvoESAP
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.result import Difference, Score, SearchResult
from liveprune.pruning.search.run import search
from liveprune.server.jobs.assignment import Assignment
from liveprune.server.jobs.budget import (
    budget_settings,
    method_options,
    plan_arguments,
    search_settings,
)
from liveprune.server.jobs.engines import engine_name, job_engine
from liveprune.server.jobs.heart import Heart
from liveprune.server.jobs.materials import Materials, gather
from liveprune.server.jobs.metered_engine import Meter, MeteredEngine
from liveprune.server.jobs.request import JobRequest, StoredRequest
from liveprune.server.jobs.tracker import Tracker

SEARCH_FOLDER = "search"
PASSES_FOLDER = "statistics"
"""Results of observer passes."""

Scores = Mapping[str, Mapping[str, Any]]
"""By ``plan``, ``full`` (fields of ``search.result.Score``) and, where both could be scored,
``difference`` (of ``Difference``: how far the plan is ahead)."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a job found."""

    plan: Plan
    """Its lineage holds method, parameters, seed, data, versions and scores."""
    scores: Mapping[str, Scores]
    """By ``dev``, ``test``: of the rows that there are."""
    measure: str | None
    statistics: Path | None = None
    """What the plan was made from, where it was one set of statistics."""


@dataclass(frozen=True, eq=False)
class Work:
    """One job in the hands of a worker."""

    stored: StoredRequest
    assignment: Assignment
    heart: Heart
    meter: Meter
    fetch_statistics: Callable[[], bytes]

    @property
    def request(self) -> JobRequest:
        return self.stored.request

    @property
    def base(self) -> Path:
        return Path(self.assignment.base)

    def run(self) -> Outcome:
        """Find the plan and score it; goes on where an earlier run was interrupted.

        Raises:
            LiveprunError: the job cannot be done.
            SearchCancelledError: the heart was told to stop.
        """
        tracker = Tracker(self.heart)
        tracker.enter("preparing")
        materials = gather(
            self.stored,
            self.assignment.folder,
            Path(self.assignment.prompts),
            self.fetch_statistics,
        )
        if self.request.searches:
            return self._search(materials, tracker)
        return self._one_pass(materials, tracker)

    def _search(self, materials: Materials, tracker: Tracker) -> Outcome:
        request, settings = self.request, search_settings(self.request)
        tasks = self._tasks(materials, train=True)
        spec = ModelSpec.from_path(self.base)
        experts = request.experts if request.experts is not None else 1.0
        with ExitStack() as stack:
            engine = self._engine(stack, settings, spec, tasks)
            found = search(
                self.base,
                spec,
                engine,
                train=tasks["train"],
                dev=tasks.get("dev"),
                test=tasks.get("test"),
                experts=experts,
                top_k=request.top_k if isinstance(request.top_k, int) else None,
                settings=settings,
                engine_name=engine_name(request, self.assignment, settings),
                seed=request.seed,
                folder=self.assignment.folder / SEARCH_FOLDER,
                progress=tracker.search,
                cancel=self.heart.cancelled,
            )
        return Outcome(found.plan, _scores_of(found), materials.measure)

    def _one_pass(self, materials: Materials, tracker: Tracker) -> Outcome:
        request = self.request
        _, own, named = method_options(request)
        learned: dict[str, Any] = {"calibration": materials.train, **named}
        if materials.statistics is not None:
            learned = {"statistics": materials.statistics, **named}
        tracker.enter("plan")
        spec = ModelSpec.from_path(self.base)
        with ExitStack() as stack:
            budget = plan_arguments(request, spec)
            if request.searches_budgets:
                budget["allocate"] = self._evoesap(stack, spec, materials, tracker)
            plan = make_plan(
                self.base,
                method=request.method,
                options=own,
                seed=request.seed,
                max_rows=request.max_rows,
                statistics_cache=self.assignment.folder / PASSES_FOLDER,
                progress=tracker.steps("plan"),
                **budget,
                **learned,
            )
        tasks = self._tasks(materials, train=False)
        scores: dict[str, Scores] = {}
        if tasks:
            with ExitStack() as stack:
                engine = self._engine(stack, Settings(merge=plan.merges), spec, tasks)
                for name, task in tasks.items():
                    tracker.enter(f"measuring {name}")
                    scores[name] = measured(task, engine, plan)
        found = {name: x["plan"]["mean"] for name, x in scores.items()}
        lineage = dataclasses.replace(plan.lineage, scores={**plan.lineage.scores, **found})
        passes = list((self.assignment.folder / PASSES_FOLDER).glob("*.safetensors"))
        return Outcome(
            dataclasses.replace(plan, lineage=lineage),
            scores,
            materials.measure,
            materials.statistics or (passes[0] if len(passes) == 1 else None),
        )

    def _evoesap(
        self, stack: ExitStack, spec: ModelSpec, materials: Materials, tracker: Tracker
    ) -> EvoESAP:
        settings, tasks = Settings(merge=False), self._tasks(materials, train=True)
        return EvoESAP(
            model=self.base,
            spec=spec,
            engine=self._engine(stack, settings, spec, tasks),
            tasks=tasks,
            folder=self.assignment.folder / SEARCH_FOLDER,
            settings=budget_settings(self.request),
            seed=self.request.seed,
            engine_name=engine_name(self.request, self.assignment, settings),
            progress=tracker.search,
            cancel=self.heart.cancelled,
        )

    def _tasks(self, materials: Materials, *, train: bool) -> dict[str, Task]:
        if materials.measure is None:
            return {}
        paths = {"train": materials.train if train else None}
        paths |= {"dev": materials.dev, "test": materials.test}
        return {
            name: load_task(
                path,
                self.base,
                measure=materials.measure,
                max_rows=self.request.max_rows,
                max_answer_tokens=self.request.max_answer_tokens,
                chat=self.request.chat,
            )
            for name, path in paths.items()
            if path is not None
        }

    def _engine(
        self, stack: ExitStack, settings: Settings, spec: ModelSpec, tasks: Mapping[str, Task]
    ) -> Engine:
        kept = [layer.experts for layer in spec.layers]  # the most that any candidate keeps
        longest = max(task.longest for task in tasks.values())
        engine = stack.enter_context(
            job_engine(self.request, self.assignment, settings, kept, longest)
        )
        return MeteredEngine(engine, self.meter, self.heart.cancelled)


def measured(task: Task, engine: Engine, plan: Plan) -> Scores:
    """Scores of the plan and of the full model, on all rows of a task.

    Raises:
        EngineError: one of them cannot be scored.
    """
    full, ours = task.values(engine, [None, plan])
    for name, values in (("full model", full), ("plan", ours)):
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            raise EngineError(f"the {name}: {bad} of {len(values)} values are not finite")
    return {
        "plan": dataclasses.asdict(Score.of(ours, task.size)),
        "full": dataclasses.asdict(Score.of(full, task.size)),
        "difference": dataclasses.asdict(Difference.of(ours, full)),
    }


def _scores_of(found: SearchResult) -> dict[str, Scores]:
    last = found.stages[-1]
    scores: dict[str, Scores] = {}
    for name in found.data.keys() & {"dev", "test"}:
        scores[name] = {
            "plan": dataclasses.asdict(last.scores[name]),
            "full": dataclasses.asdict(found.full[name]),
        }
        difference = last.differences.get(name, {}).get("full")
        if difference is not None:
            scores[name] = {**scores[name], "difference": dataclasses.asdict(difference)}
    return scores
