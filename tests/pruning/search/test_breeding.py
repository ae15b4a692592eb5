from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveprune.pruning.search.breeding import Breeding
from liveprune.pruning.search.evaluator import Evaluator
from liveprune.pruning.search.genome import Space, make_space
from liveprune.pruning.search.journal import Journal, open_folder
from liveprune.pruning.search.operators import initial
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.row_sets import RowSet
from tests.pruning.search.fakes import FakeTask, spec_of

SPEC = spec_of(8, layers=2)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with open_folder(tmp_path, {}) as journal:
        yield journal


def breeding(journal: Journal, experts: int = 4, **changes: Any) -> tuple[Breeding, Space]:
    settings = Settings(inits=6, prune_candidates=6, merge_candidates=12, **changes)
    space = make_space(SPEC, settings, experts=experts)
    train = RowSet("train", FakeTask(lambda plan, row: 0.5, 4), (0, 1, 2, 3))  # type: ignore[arg-type]
    return Breeding(space, settings, 7, Evaluator(None, journal), train, lambda: None), space  # type: ignore[arg-type]


def test_each_candidate_draws_from_its_own_stream(journal: Journal) -> None:
    bred, space = breeding(journal)
    bred.prune([])
    for index, candidate in enumerate(bred.population):
        expected = space.plan(initial(space, np.random.default_rng([7, 1 + index])))
        assert candidate.plan == expected
        assert (candidate.index, candidate.stage) == (index, "prune")


@pytest.mark.parametrize("from_winner", [True, False])
def test_merging_starts_from_the_winner_or_from_all(journal: Journal, from_winner: bool) -> None:
    # So little noise that the largest element of a row tells the experts it started from.
    bred, _ = breeding(
        journal, merge_from_winner=from_winner, scale=1e-3, crossover_prob=0.0, norm_prob=0.0
    )
    bred.prune([])
    winner = bred.population[3]
    bred.merge(winner)
    merged = [x for x in bred.population if x.stage == "merge"]
    assert len(merged) == 12
    origins = {tuple(m.argmax(axis=1).tobytes() for m in x.genome.merge) for x in merged}
    home = tuple(m.argmax(axis=1).tobytes() for m in winner.genome.merge)
    assert origins == {home} if from_winner else len(origins) > 1


def test_merging_alone_starts_from_all_experts(journal: Journal) -> None:
    bred, _ = breeding(journal, experts=8)
    bred.merge(None)
    assert len(bred.population) == 12
    first, *others = (x.plan for x in bred.population)
    assert all(layer.is_identity for layer in first.layers)
    assert all(plan.merges for plan in others)


def test_children_become_parents_of_the_merge_stage(journal: Journal) -> None:
    bred, _ = breeding(
        journal,
        merge_from_winner=True,
        children=1,
        crossover_prob=0.0,
        norm_prob=0.0,
        weight_change_prob=1.0,
        transfer_change_prob=0.0,
    )
    bred.prune([])
    winner = bred.population[0].genome
    bred.merge(bred.population[0])
    changed = [
        sum(np.count_nonzero(a != b) for a, b in zip(x.genome.merge, winner.merge, strict=True))
        for x in bred.population[6:]
    ]
    # A mutation touches a quarter of the 64 elements: mean 16, deviation 3.5.
    assert changed[0] < 30
    assert max(changed) > 35


def test_given_prunings_come_before_random_ones(journal: Journal) -> None:
    bred, space = breeding(journal)
    given = [initial(space, np.random.default_rng(100 + i)) for i in range(3)]
    bred.prune([given[0], given[1], given[0], given[2]])  # one of them twice
    plans = [x.plan for x in bred.population]
    assert plans[:3] == [space.plan(genome) for genome in given]
    assert len(plans) == len(set(plans)) == 6


def test_more_given_prunings_than_first_ones_are_all_tried(journal: Journal) -> None:
    bred, space = breeding(journal, children=1)
    given = [initial(space, np.random.default_rng(100 + i)) for i in range(5)]
    bred._settings = Settings(inits=2, prune_candidates=6)
    bred.prune(given)
    assert [x.plan for x in bred.population[:5]] == [space.plan(genome) for genome in given]
