"""The winner of a stage: the best by train, scored again on rows the search has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from liveprune.pruning.errors import EngineError
from liveprune.pruning.search.candidate import Candidate, Values, by_train
from liveprune.pruning.search.evaluator import Evaluator, Failure
from liveprune.pruning.search.row_sets import RowSet


@dataclass(frozen=True)
class Selection:
    """Candidates of one re-selection with their values on all dev rows, best first."""

    ranking: tuple[tuple[Candidate, Values], ...]
    train_best: tuple[Candidate, Values]
    """The one that leads by train score among those that could be scored on dev."""

    @property
    def winner(self) -> Candidate:
        return self.ranking[0][0]


def reselect(
    evaluator: Evaluator,
    dev: RowSet,
    population: Sequence[Candidate],
    previous: Candidate | None,
    count: int,
) -> Selection:
    """Score the ``count`` best by train, and the previous stage's winner, on all dev rows.

    The best dev mean wins; of equal ones the best by train, then the earliest. Since the previous
    winner stands again, no stage ends below the one before it.

    Raises:
        EngineError: not one candidate could be scored.
    """
    finalists = by_train(population)[:count]
    if previous is not None and previous not in finalists:
        finalists.append(previous)
    results = evaluator.score(dev, [x.plan for x in finalists]) if finalists else []
    scored = [
        (x, values)
        for x, values in zip(finalists, results, strict=True)
        if not isinstance(values, Failure)
    ]
    if not scored:
        reasons = [x.message for x in results if isinstance(x, Failure)]
        reasons += [x.failure for x in population if x.failure is not None]
        raise EngineError(
            f"none of {len(population)} candidates could be scored, though the full model can: "
            f"{reasons[0]}"
        )
    ranking = sorted(scored, key=lambda x: (-x[1].mean(), -x[0].mean, x[0].index))
    train_best = min(scored, key=lambda x: (-x[0].mean, x[0].index))
    return Selection(tuple(ranking), train_best)
