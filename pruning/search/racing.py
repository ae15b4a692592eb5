"""Scoring one generation on the train rows, block by block, giving up on the hopeless."""

from __future__ import annotations

from collections.abc import Sequence

from liveprune.pruning.evaluation.intervals import paired_difference
from liveprune.pruning.search.candidate import Candidate
from liveprune.pruning.search.evaluator import Evaluator, Failure
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.row_sets import RowSet


def race(
    evaluator: Evaluator,
    train: RowSet,
    batch: Sequence[Candidate],
    incumbent: Candidate | None,
    settings: Settings,
) -> None:
    """Score the candidates of ``batch`` in place.

    With racing, after each block of rows a candidate is dropped whose values lie more than
    ``race_z`` standard errors of the paired difference below those of the best on the same rows:
    the incumbent (the best complete candidate so far) or one of the batch.
    """
    size = len(train.rows)
    block = settings.block if settings.racing else size
    alive = list(batch)
    for start in range(0, size, block):
        stop = min(start + block, size)
        results = evaluator.score(train, [x.plan for x in alive], stop)
        for candidate, result in zip(alive, results, strict=True):
            if isinstance(result, Failure):
                candidate.failure = result.message
            else:
                candidate.values = result
        alive = [x for x in alive if x.failure is None]
        if not alive:
            return
        if stop < size:
            rivals = [x.values for x in alive]
            if incumbent is not None:
                rivals.append(incumbent.values[:stop])
            best = max(rivals, key=lambda values: float(values.mean()))
            for candidate in alive:
                _, _, z = paired_difference(best, candidate.values)
                candidate.dropped = candidate.values is not best and z > settings.race_z
            alive = [x for x in alive if not x.dropped]
