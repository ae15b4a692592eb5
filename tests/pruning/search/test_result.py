from __future__ import annotations

import numpy as np
import pytest

from liveprune.pruning.search.evaluator import Failure
from liveprune.pruning.search.genome import Genome, make_space, one_hot
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.result import CurvePoint, Difference, Score, curve_of
from tests.pruning.search.fakes import candidate, spec_of

SPACE = make_space(spec_of(layers=1), Settings(), experts=1)
ROWS = (one_hot([0], 4),)
GENOME = Genome(ROWS, ROWS)


def test_the_curve_rises_by_complete_candidates_only() -> None:
    population = [
        candidate(SPACE, GENOME, 0, 0.9, rows=2, dropped=True),
        candidate(SPACE, GENOME, 1, 0.5),
        candidate(SPACE, GENOME, 2, 0.95, failure="NaN"),
        candidate(SPACE, GENOME, 3, 0.25),
        candidate(SPACE, GENOME, 4, 0.75),
    ]
    assert curve_of(population) == (
        CurvePoint(0, "prune", 0.9, 2, "dropped", None),
        CurvePoint(1, "prune", 0.5, 4, "complete", 0.5),
        CurvePoint(2, "prune", None, 4, "failed", 0.5, "NaN"),
        CurvePoint(3, "prune", 0.25, 4, "complete", 0.5),
        CurvePoint(4, "prune", 0.75, 4, "complete", 0.75),
    )


def test_scores() -> None:
    share = Score.of(np.array([1.0, 0, 1, 1]), 4)
    assert (share.n, share.mean) == (4, 0.75)
    assert (share.low, share.high) == pytest.approx((0.30064, 0.95441), abs=1e-5)  # Wilson
    assert Score.of(Failure("NaN"), 4) == Score(4, failure="NaN")


def test_differences() -> None:
    found = Difference.of(np.array([1.0, 1, 1, 0]), np.array([0.0, 1, 0, 0]))
    # 1, 0, 1, 0: mean 0.5, standard error 0.28868; t(3) = 3.18245.
    assert found.difference == 0.5
    assert (found.low, found.high) == pytest.approx((0.5 - 0.91869, 1.0), abs=1e-5)
    assert found.z == pytest.approx(1.73205, abs=1e-5)
    assert Difference.of(np.ones(3), np.zeros(3)).z is None
