from __future__ import annotations

import itertools
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.budget import layer_budgets, parse_budget
from liveprune.pruning.errors import EngineError, PlanError
from liveprune.pruning.plan import Plan
from liveprune.pruning.search import budget_search
from liveprune.pruning.search.budget_search import BudgetSettings, EvoESAP
from liveprune.pruning.search.budget_vectors import first_vectors, mutate, shapes, vector_of
from liveprune.pruning.search.evaluator import SearchCancelledError
from tests.pruning.search.fakes import FakeTask, spec_of

WANTED = (1, 3, 0, 2)
"""The best removals of the four layers."""


def test_shapes_by_hand() -> None:
    found = {name: vector_of(x, [6] * 4, 8) for name, x in shapes(4).items()}
    assert found["uniform"] == (2, 2, 2, 2)
    assert found["up"] == (1, 2, 2, 3)  # quotas 0.8, 1.6, 2.4, 3.2
    assert found["down"] == (3, 2, 2, 1)
    assert found["mid"] == (1, 3, 3, 1)  # quotas 4/3, 8/3
    assert found["mid-neg"] == (3, 1, 1, 3)
    assert found["block-early"] == (3, 2, 2, 1)  # quotas 3.2, 1.6, 1.6, 1.6
    assert found["alternating"] == (1, 3, 1, 3)
    assert found["deep-flat"] == (1, 3, 2, 2)  # quotas 8/7, 16/7, 16/7, 16/7
    assert vector_of([Fraction(1)] * 3, [1, 6, 6], 7) == (1, 3, 3), "what a cap refuses is shared"


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.data())
def test_sums_and_caps_always_hold(caps: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(caps)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    vectors = first_vectors(caps, total, 12, rng)
    assert len(vectors) == len(set(vectors)) >= 1
    changed = [mutate(x, caps, rng, moves=3, delta=4, attempts=32) for x in vectors for _ in "abc"]
    for vector in (*vectors, *changed):
        assert sum(vector) == total
        assert all(0 <= x <= cap for x, cap in zip(vector, caps, strict=True))


def test_mutations_reach_every_neighbour() -> None:
    rng = np.random.default_rng(0)
    seen = {mutate((1, 1, 1), [2, 2, 2], rng, moves=1, delta=1, attempts=32) for _ in range(300)}
    assert seen == set(itertools.permutations((0, 1, 2)))


def fitness(plan: Plan | None, row: int) -> float:
    if plan is None:
        return 0.9
    removed = [layer.experts - layer.kept_experts for layer in plan.layers]
    distance = sum(abs(a - b) for a, b in zip(removed, WANTED, strict=True))
    return 0.8 - 0.05 * distance + 0.0001 * (row % 7)


def search(folder: Path, **changes: Any) -> EvoESAP:
    fields: dict[str, Any] = {
        "model": Path("model"),
        "spec": spec_of(experts=6, layers=4, top_k=2),
        "engine": object(),
        "tasks": {"train": FakeTask(fitness, 30), "test": FakeTask(fitness, 20, "test")},
        "folder": folder,
        "settings": BudgetSettings(population=10, elites=3, generations=12),
        "seed": 0,
    }
    return EvoESAP(**{**fields, **changes})


def counts(found: EvoESAP) -> dict[int, int]:
    spec = found.spec
    budgets = layer_budgets(spec, parse_budget("0.75"), allocate="global")
    ranked = {i: np.arange(6.0) for i in range(4)}
    return found.counts(budgets, ranked, 24 - sum(WANTED))


@pytest.fixture(autouse=True)
def no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_search, "fingerprint_model", lambda model: "f" * 32)


def test_it_finds_the_enumerated_optimum(tmp_path: Path) -> None:
    found = search(tmp_path)
    assert counts(found) == {i: 6 - x for i, x in enumerate(WANTED)}
    facts = found.facts()
    assert facts["removals"] == list(WANTED)
    assert facts["scores"]["train"] > facts["uniform"]["train"]
    assert set(facts["scores"]) == {"train", "test"}


def test_dev_rows_choose_among_the_elites(tmp_path: Path) -> None:
    def other(plan: Plan | None, row: int) -> float:
        return 0.5 if plan is None else 1 - fitness(plan, row)

    train = FakeTask(fitness, 30)
    found = search(tmp_path, tasks={"train": train, "dev": FakeTask(other, 20, "dev")})
    counts(found)
    assert found.facts()["removals"] != list(WANTED)


def test_stopped_and_run_again_it_ends_the_same(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole")
    expected = counts(whole)
    cancel = threading.Event()

    def stop(progress: Any) -> None:
        nonlocal steps
        steps += progress.stage == "budgets" and not progress.replaying
        if steps == 2:  # the first may be where the journal ends
            cancel.set()

    for _ in range(40):
        steps = 0
        again = search(tmp_path / "parts", cancel=cancel, progress=stop)
        try:
            assert counts(again) == expected
            break
        except SearchCancelledError:
            cancel.clear()
    else:
        pytest.fail("it never came to an end")
    assert again.facts() == whole.facts()


def test_failed_vectors_do_not_end_it(tmp_path: Path) -> None:
    def broken(plan: Plan | None, row: int) -> float:
        bad = plan is not None and plan.layers[0].kept_experts == 6
        return float("nan") if bad else fitness(plan, row)

    assert counts(search(tmp_path, tasks={"train": FakeTask(broken, 30)}))[0] < 6
    never = FakeTask(lambda plan, _: 0.5 if plan is None else float("nan"), 30)
    hopeless = search(tmp_path / "never", tasks={"train": never})
    with pytest.raises(EngineError, match=r"none of .* budgets could be scored"):
        counts(hopeless)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(PlanError, match="elites is 9, expected at most the population, 8"):
        BudgetSettings(population=8, elites=9)
    with pytest.raises(PlanError, match="delta is 0, expected a whole number from 1"):
        BudgetSettings(delta=0)
