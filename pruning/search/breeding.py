"""The population of a search and how it grows, generation by generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from liveprune.pruning.plan import Plan
from liveprune.pruning.search.candidate import Candidate, by_train
from liveprune.pruning.search.evaluator import Evaluator
from liveprune.pruning.search.genome import Genome, Space
from liveprune.pruning.search.operators import initial, merge_child, prune_child
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.racing import race
from liveprune.pruning.search.row_sets import RowSet

REDRAWS = 1000
"""Draws without a plan that is new, after which the space counts as searched."""

Draw = Callable[[Sequence[Candidate], np.random.Generator], Genome]


class Breeding:
    """All candidates of a search, in the order in which they were made.

    Each has a generator of its own, seeded by the search's seed and its index: what is drawn for
    one does not depend on how often another had to be drawn again.
    """

    def __init__(
        self,
        space: Space,
        settings: Settings,
        seed: int,
        evaluator: Evaluator,
        train: RowSet,
        report: Callable[[], None],
    ) -> None:
        """``report`` is called after each generation."""
        self.population: list[Candidate] = []
        self._space = space
        self._settings = settings
        self._seed = seed
        self._evaluator = evaluator
        self._train = train
        self._report = report
        self._seen: set[str] = set()

    def prune(self, starts: Sequence[Genome]) -> None:
        """The given prunings, random ones, children of the population, and random ones again.

        The last only where the parents have no new children left: what remains of the space is
        then as good as any other part of it.
        """
        settings, space = self._settings, self._space

        given = list(starts)

        def fresh(_: Sequence[Candidate], rng: np.random.Generator) -> Genome:
            return given.pop(0) if given else initial(space, rng)

        def child(parents: Sequence[Candidate], rng: np.random.Generator) -> Genome:
            return prune_child(space, settings, parents, rng)

        budget = settings.prune_candidates
        inits = max(settings.inits, len(starts))
        self._grow("prune", min(inits, budget), self.population, fresh)
        self._grow("prune", budget - len(self.population), self.population, child)
        self._grow("prune", budget - len(self.population), self.population, fresh)

    def merge(self, winner: Candidate | None) -> None:
        """Children with real-valued coefficients, of the population or of ``winner``.

        Without a prune stage (``winner`` None) the first candidate is the model with all experts.
        """
        settings, space = self._settings, self._space
        count = settings.merge_candidates
        parents = self.population
        if winner is None:
            self._grow("merge", 1, parents, lambda _, rng: initial(space, rng))
            count -= 1
        elif settings.merge_from_winner:
            parents = [winner]
        self._grow(
            "merge", count, parents, lambda some, rng: merge_child(space, settings, some, rng)
        )

    def _grow(self, stage: str, count: int, parents: list[Candidate], draw: Draw) -> None:
        """Add up to ``count`` candidates, fewer where nothing new is found, to ``parents``, too."""
        while count > 0:
            batch: list[Candidate] = []
            while len(batch) < min(count, self._settings.children):
                index = len(self.population) + len(batch)
                drawn = self._draw_new(draw, parents, index)
                if drawn is None:
                    count = len(batch)
                    break
                batch.append(Candidate(index, stage, *drawn))
            incumbent = next(iter(by_train(self.population)), None)
            race(self._evaluator, self._train, batch, incumbent, self._settings)
            self.population += batch
            if parents is not self.population:
                parents += batch
            count -= len(batch)
            self._report()

    def _draw_new(
        self, draw: Draw, parents: Sequence[Candidate], index: int
    ) -> tuple[Genome, Plan] | None:
        """A genome whose plan no candidate has had so far."""
        # Stream 0 orders the train rows.
        rng = np.random.default_rng([self._seed, 1 + index])
        for _ in range(REDRAWS):
            genome = draw(parents, rng)
            plan = self._space.plan(genome)
            if plan.digest not in self._seen:
                self._seen.add(plan.digest)
                return genome, plan
        return None
