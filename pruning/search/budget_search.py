"""EvoESAP: a search for how many experts each layer keeps, over any ranking within the layers.

arXiv:2603.06003 (methods.md 7.1). An individual is a vector of removals. Its plan slices the lowest
ranked experts off; its fitness is a task's measure, in the paper expected acceptance (``esap``).
What the paper does not state is ours: parents are drawn from the better half of the population, and
where there are dev rows the elites are scored on them and the best of these wins.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from liveprune.pruning.allocation import Scores, select
from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.errors import EngineError, PlanError
from liveprune.pruning.evaluation.engine import Engine
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.search.budget_vectors import Vector, first_vectors, mutate
from liveprune.pruning.search.evaluator import Evaluator, Failure
from liveprune.pruning.search.journal import open_folder
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.row_sets import RowSet, row_sets
from liveprune.pruning.search.run import Progress

if TYPE_CHECKING:
    from liveprune.pruning.budget import LayerBudget
    from liveprune.pruning.evaluation.task import Task


@dataclass(frozen=True)
class BudgetSettings:
    """Hyper-parameters; the paper's, but for 50 generations on OLMoE and 20 on ERNIE-4.5."""

    population: int = 32
    elites: int = 4
    """Best ones, which live on."""
    generations: int = 10
    moves: int = 3
    delta: int = 4
    """Removals that one move takes from layer to layer, at most."""
    attempts: int = 32
    """Tries to mutate within the bounds, and to find a vector that is new."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name == "generations" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PlanError(f"{name} is {value!r}, expected a whole number from {least}")
        if self.elites > self.population:
            raise PlanError(
                f"elites is {self.elites}, expected at most the population, {self.population}"
            )


@dataclass
class EvoESAP:
    """An ``Allocator`` that searches; called again with the same arguments it goes on."""

    model: Path
    spec: ModelSpec
    engine: Engine
    tasks: Mapping[str, Task]
    """``train`` and perhaps ``dev`` and ``test``."""
    folder: Path
    """Where it keeps what it did; new or empty at first."""
    settings: BudgetSettings
    seed: int
    engine_name: str = ""
    progress: Callable[[Progress], None] | None = None
    cancel: threading.Event | None = None
    name: str = "evoesap"
    _facts: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        return self._facts

    def counts(
        self, budgets: Sequence[LayerBudget], ranked: Mapping[int, Scores], total: int
    ) -> dict[int, int]:
        """See ``Allocator``.

        Raises:
            DataError: rows are shared between sets; the folder holds another search.
            EngineError: the engine failed on the full model, or no vector could be scored.
            SearchCancelledError: ``cancel`` was set.
        """
        sets = row_sets(self.tasks, Settings(), self.seed)
        if "dev" not in self.tasks:
            # Nothing is chosen on dev unless there are rows for it; all of train counts.
            del sets["dev"]
            every = tuple(range(self.tasks["train"].size))
            sets["train"] = RowSet("train", self.tasks["train"], every)
        space = _Space(self.spec, budgets, ranked, total)
        identity = {
            "model": fingerprint_model(self.model),
            "data": {key: task.digest for key, task in self.tasks.items()},
            "method": {
                "name": self.name,
                **dataclasses.asdict(self.settings),
                "engine": self.engine_name,
                # The ranking and the bounds, as far as they make a difference.
                "most_pruned": space.plan(tuple(space.caps)).digest,
                "total": total,
            },
            "seed": self.seed,
        }
        with open_folder(self.folder, identity) as journal:
            evaluator = Evaluator(self.engine, journal, self.cancel)
            run = _Run(space, self.settings, self.seed, evaluator, sets, self.progress)
            best = run.search()
            self._facts = {
                "name": self.name,
                **dataclasses.asdict(self.settings),
                "measure": self.tasks["train"].measure,
                "rows": {key: task.digest for key, task in self.tasks.items()},
                "removals": list(best),
                "scores": run.means(best),
                "uniform": run.means(run.uniform),
                "evaluated": len(run.fitness),
            }
        return space.counts(best)


class _Space:
    """What vectors mean for a model."""

    def __init__(
        self,
        spec: ModelSpec,
        budgets: Sequence[LayerBudget],
        ranked: Mapping[int, Scores],
        total: int,
    ) -> None:
        self.spec, self.budgets, self.ranked = spec, budgets, ranked
        self.unit = spec.router.groups
        self.open = [item for item in budgets if not item.skipped]
        self.least = [(x.layer.experts - x.ceiling) // self.unit for x in self.open]
        """Removals that a layer's ceiling asks for; vectors count what is beyond."""
        self.caps = [(x.ceiling - x.floor) // self.unit for x in self.open]
        experts = sum(item.layer.experts for item in self.open)
        self.removals = (experts - total) // self.unit - sum(self.least)

    def counts(self, vector: Vector) -> dict[int, int]:
        found = {item.layer.index: item.layer.experts for item in self.budgets}
        for item, removals in zip(self.open, vector, strict=True):
            found[item.layer.index] = item.ceiling - removals * self.unit
        return found

    def plan(self, vector: Vector) -> Plan:
        counts = self.counts(vector)
        layers = []
        for item in self.budgets:
            index = item.layer.index
            kept = select(self.ranked[index], counts[index], self.spec.router, index)
            layers.append(LayerPlan(index, item.layer.experts, item.top_k, kept))
        return Plan(
            self.spec.architecture.model_type,
            self.spec.num_hidden_layers,
            tuple(layers),
            Lineage("evoesap"),
        )


class _Run:
    """One search from its first evaluation to its last."""

    def __init__(
        self,
        space: _Space,
        settings: BudgetSettings,
        seed: int,
        evaluator: Evaluator,
        sets: Mapping[str, RowSet],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.space, self.settings, self.evaluator = space, settings, evaluator
        self.sets, self.progress = sets, progress
        self.rng = np.random.default_rng([seed, 1])
        self.fitness: dict[Vector, float] = {}
        """Mean over the train rows, in the order of evaluation; minus infinity where it failed."""
        self.failure = ""
        self.uniform: Vector = ()

    def search(self) -> Vector:
        settings, space = self.settings, self.space
        self.evaluator.score(self.sets["train"], [None])  # an engine that cannot run is found out
        first = first_vectors(space.caps, space.removals, settings.population, self.rng)
        self.uniform = first[0]
        self._score(first)
        population = self._best(first)
        for _ in range(settings.generations):
            children = self._children(population)
            if not children:
                break
            self._score(children)
            population = self._best([*population[: settings.elites], *children])
        finalists = [x for x in self._best(list(self.fitness)) if self.fitness[x] > -np.inf]
        if not finalists:
            raise EngineError(
                f"none of {len(self.fitness)} budgets could be scored, though the full model can: "
                f"{self.failure}"
            )
        best = finalists[0]
        if "dev" in self.sets:
            elites = finalists[: settings.elites]
            dev = [self._mean("dev", x) for x in elites]
            best = elites[int(np.argmax(dev))]
        self._report("test")
        return best

    def means(self, vector: Vector) -> dict[str, float | None]:
        """Of a vector, on every set of rows; null where it failed."""
        found = {name: self._mean(name, vector) for name in self.sets}
        return {name: None if mean == -np.inf else mean for name, mean in found.items()}

    def _mean(self, rows: str, vector: Vector) -> float:
        (found,) = self.evaluator.score(self.sets[rows], [self.space.plan(vector)])
        return -np.inf if isinstance(found, Failure) else float(found.mean())

    def _score(self, vectors: Sequence[Vector]) -> None:
        plans = [self.space.plan(vector) for vector in vectors]
        found = self.evaluator.score(self.sets["train"], plans)
        for vector, values in zip(vectors, found, strict=True):
            if isinstance(values, Failure):
                self.failure = values.message
                self.fitness[vector] = -np.inf
            else:
                self.fitness[vector] = float(values.mean())
        self._report("budgets")

    def _best(self, vectors: Sequence[Vector]) -> list[Vector]:
        """Best first; of equal ones the one scored earlier."""
        place = {vector: i for i, vector in enumerate(self.fitness)}
        return sorted(set(vectors), key=lambda x: (-self.fitness[x], place[x]))

    def _children(self, population: Sequence[Vector]) -> list[Vector]:
        settings = self.settings
        parents = population[: max(1, len(population) // 2)]
        children: dict[Vector, None] = {}
        for _ in range(settings.population - settings.elites):
            for _ in range(settings.attempts):
                child = mutate(
                    parents[int(self.rng.integers(len(parents)))],
                    self.space.caps,
                    self.rng,
                    moves=settings.moves,
                    delta=settings.delta,
                    attempts=settings.attempts,
                )
                if child not in self.fitness and child not in children:
                    children[child] = None
                    break
        return list(children)

    def _report(self, stage: str) -> None:
        if self.progress is None:
            return
        settings = self.settings
        planned = settings.population + settings.generations * (
            settings.population - settings.elites
        )
        best = max(self.fitness.values())
        self.progress(
            Progress(
                stage,
                len(self.fitness),
                planned,
                None if best == -np.inf else best,
                self.evaluator.replaying,
            )
        )
