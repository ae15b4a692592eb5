"""The EEP search: prune, then merge, from a model and its data to two plans and their scores."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.errors import EngineError, PlanError
from liveprune.pruning.evaluation.engine import Engine
from liveprune.pruning.model_name import model_name
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Lineage, Plan
from liveprune.pruning.prune import installed_versions
from liveprune.pruning.search.breeding import Breeding
from liveprune.pruning.search.candidate import Candidate, by_train
from liveprune.pruning.search.evaluator import Evaluator, Failure
from liveprune.pruning.search.genome import Genome, Space, make_space
from liveprune.pruning.search.journal import open_folder
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.result import (
    Difference,
    Finalist,
    Score,
    SearchResult,
    StageResult,
    curve_of,
)
from liveprune.pruning.search.row_sets import RowSet, row_sets
from liveprune.pruning.search.selection import Selection, reselect

if TYPE_CHECKING:
    from liveprune.pruning.evaluation.task import Task


@dataclass(frozen=True)
class Progress:
    """How far a search is."""

    stage: str
    """``prune`` or ``merge``; ``test`` when both are through; ``done``."""
    done: int
    """Candidates scored."""
    total: int
    """Candidates in all; less than planned once a stage has run out of new ones."""
    best: float | None
    """Best mean train fitness so far."""
    replaying: bool
    """Repeating from the journal what an earlier run did; says nothing about the time left."""


def search(
    model: Path,
    spec: ModelSpec,
    engine: Engine,
    *,
    train: Task,
    folder: Path,
    experts: str | float | Sequence[int],
    dev: Task | None = None,
    test: Task | None = None,
    top_k: int | None = None,
    settings: Settings | None = None,
    starts: Mapping[str, Plan] | None = None,
    engine_name: str = "",
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> SearchResult:
    """Search for the pruning, then the merge, that answers ``train`` best.

    Called again with the same arguments it goes on where it stopped, however that was, and ends
    with the same result as if it had not.

    Args:
        model: The checkpoint's folder.
        spec: Of that checkpoint.
        engine: Scores plans of that checkpoint.
        train: Rows that fitness is measured on.
        folder: Where the search keeps what it did; new or empty at first.
        experts: Experts to keep, see ``budget``; as many as there are leaves only the merge stage.
        dev: Rows that the winners are chosen on; None puts a part of ``train`` aside.
        test: Rows touched once, at the end.
        top_k: Active experts; None keeps the model's.
        settings: Hyper-parameters; None is the preset ``liveprune``.
        starts: Pruned plans, by where they are from, whose closest candidates come before the
            random ones (see ``Space.closest``). EEP as published has none.
        engine_name: What computes, and in which dtype: another one rounds otherwise, so going on
            with it is refused.
        seed: From 0; the same seed makes the same search.
        progress: Called after each generation.
        cancel: Once set, the search stops before its next call of the engine.

    Raises:
        PlanError: the budget or a setting does not fit the model, or could not be served.
        DataError: rows are missing or shared between sets; the folder holds another search.
        ConflictError: another search uses the folder.
        EngineError: the engine failed on the full model, or no candidate could be scored.
        SearchCancelledError: ``cancel`` was set.
        CheckpointError: the checkpoint cannot be read.
    """
    settings = settings or Settings()
    if seed < 0:
        raise PlanError(f"seed is {seed}, expected at least 0")
    name = model_name(model)
    space = make_space(spec, settings, experts=experts, top_k=top_k, base_model=name)
    if starts and not space.prunes:
        raise PlanError("starts: found prunings, expected none where all experts stay")
    genomes = {name: space.closest(plan) for name, plan in (starts or {}).items()}
    tasks = {"train": train, "dev": dev, "test": test}
    sets = row_sets({k: task for k, task in tasks.items() if task is not None}, settings, seed)
    parameters = {
        **dataclasses.asdict(settings),
        "experts": experts if isinstance(experts, str | int | float) else list(experts),
        "top_k": top_k,
        "literal": space.literal,
        "starts": {name: space.plan(genome).digest for name, genome in genomes.items()},
        "engine": engine_name,
    }
    weights = fingerprint_model(model)
    identity = {
        "model": weights,
        "data": {k: None if task is None else task.digest for k, task in tasks.items()},
        "method": {"name": "eep", **parameters},
        "seed": seed,
    }
    with open_folder(folder, identity) as journal:
        evaluator = Evaluator(engine, journal, cancel)
        run = _Run(space, settings, seed, evaluator, sets, progress)
        run.stages([*genomes.values()])
        lineage = Lineage(
            method="eep",
            parameters=parameters,
            seed=seed,
            calibration=train.digest,
            versions=installed_versions(),
        )
        return SearchResult(
            model=name,
            fingerprint=weights,
            seed=seed,
            parameters=parameters,
            versions=lineage.versions,
            data={
                key: {"rows": len(x.rows), "digest": x.task.digest, "measure": x.task.measure}
                for key, x in sets.items()
            },
            groups=tuple(tuple(group.layers) for group in space.groups),
            full=run.scores(None),
            stages=tuple(run.stage_result(stage, lineage) for stage in run.selections),
            curve=curve_of(run.breeding.population),
            cost=evaluator.cost,
        )


class _Run:
    """One search from its first evaluation to its last."""

    def __init__(
        self,
        space: Space,
        settings: Settings,
        seed: int,
        evaluator: Evaluator,
        sets: Mapping[str, RowSet],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.space = space
        self.settings = settings
        self.evaluator = evaluator
        self.sets = sets
        self.progress = progress
        self.selections: dict[str, Selection] = {}
        self.breeding = Breeding(space, settings, seed, evaluator, sets["train"], self.report)
        planned = {"prune": settings.prune_candidates if space.prunes else 0}
        planned["merge"] = settings.merge_candidates if settings.merge else 0
        self.planned = planned
        self.stage = "prune" if space.prunes else "merge"

    def stages(self, starts: Sequence[Genome]) -> None:
        for rows in ("train", "dev"):  # first, so that an engine that cannot run is found out
            (full,) = self.evaluator.score(self.sets[rows], [None])
            if isinstance(full, Failure):
                raise EngineError(f"the full model cannot be scored on {rows}: {full.message}")
        winner = None
        if self.space.prunes:
            self.breeding.prune(starts)
            winner = self._select("prune", None)
        if self.settings.merge:
            self.stage = "merge"
            self.breeding.merge(winner)
            self._select("merge", winner)
        self._enter("test")
        if "test" in self.sets:
            winners = [x.winner.plan for x in self.selections.values()]
            self.evaluator.score(self.sets["test"], [None, *winners])
        self._enter("done")

    def report(self) -> None:
        if self.progress is None:
            return
        population = self.breeding.population
        best = next((x.mean for x in by_train(population)), None)
        self.progress(
            Progress(
                self.stage,
                len(population),
                sum(self.planned.values()),
                best,
                self.evaluator.replaying,
            )
        )

    def scores(self, plan: Plan | None) -> dict[str, Score]:
        """Of a plan that has been scored on all sets."""
        return {
            name: Score.of(self.evaluator.score(rows, [plan])[0], len(rows.rows))
            for name, rows in self.sets.items()
        }

    def stage_result(self, name: str, lineage: Lineage) -> StageResult:
        selection = self.selections[name]
        winner = selection.winner
        scores = self.scores(winner.plan)
        found = {key: score.mean for key, score in scores.items()}
        lineage = dataclasses.replace(
            lineage, parameters={**lineage.parameters, "stage": name}, scores=found
        )
        return StageResult(
            name=name,
            winner=winner.index,
            plan=self.space.plan(winner.genome, lineage),
            scores=scores,
            finalists=tuple(
                Finalist(x.index, x.mean, float(values.mean())) for x, values in selection.ranking
            ),
            differences={rows: self._differences(rows, name, selection) for rows in self.sets},
        )

    def _differences(self, rows: str, stage: str, selection: Selection) -> dict[str, Difference]:
        others: dict[str, Candidate | None] = {"full": None}
        if stage == "merge" and "prune" in self.selections:
            others["prune"] = self.selections["prune"].winner
        if rows == "dev":
            others["train_best"] = selection.train_best[0]
            if len(selection.ranking) > 1:
                others["runner_up"] = selection.ranking[1][0]
        winner = selection.winner
        asked = {name: x for name, x in others.items() if x is not winner}
        plans = [None if x is None else x.plan for x in asked.values()]
        ours, *theirs = self.evaluator.score(self.sets[rows], [winner.plan, *plans])
        if isinstance(ours, Failure):
            return {}
        return {
            name: Difference.of(ours, values)
            for name, values in zip(asked, theirs, strict=True)
            if not isinstance(values, Failure)
        }

    def _select(self, stage: str, previous: Candidate | None) -> Candidate:
        made = sum(x.stage == stage for x in self.breeding.population)
        self.planned[stage] = made
        selection = reselect(
            self.evaluator,
            self.sets["dev"],
            self.breeding.population,
            previous,
            self.settings.dev_num,
        )
        self.selections[stage] = selection
        return selection.winner

    def _enter(self, stage: str) -> None:
        self.stage = stage
        self.report()
