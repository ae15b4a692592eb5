from __future__ import annotations

from typing import Any

import pytest

from liveprune.pruning.errors import PlanError
from liveprune.pruning.pareto.grid import Grid, make_grid
from tests.pruning.search.fakes import spec_of


def grid_of(**changes: Any) -> Grid:
    arguments: dict[str, Any] = {
        "methods": ["reap"],
        "budgets": {"2": "2", "0.75": "0.75"},
        "top_ks": [1, 2],
        "calibrated": True,
        **changes,
    }
    return make_grid(spec_of(experts=4, layers=2, top_k=2), **arguments)


def names(grid: Grid) -> list[str]:
    return [point.name for point in grid.points]


def test_every_method_under_every_budget_and_top_k() -> None:
    found = grid_of(controls=False)
    assert names(found) == ["reap-e2-k1", "reap-e2-k2", "reap-e0.75-k1", "reap-e0.75-k2"]
    assert not found.skipped
    assert not any(point.control for point in found.points)


def test_controls_are_added_with_three_seeds_and_marked() -> None:
    found = grid_of(budgets={"2": "2"}, top_ks=[1], seeds=1)
    assert names(found) == [
        "reap-e2-k1",
        *(f"random-e2-k1-s{seed}" for seed in range(3)),
        "frequency-e2-k1",
    ]
    assert [point.control for point in found.points] == [False, True, True, True, True]


def test_a_control_that_was_asked_for_is_none_and_has_its_seeds_all_the_same() -> None:
    found = grid_of(methods=["random"], budgets={"2": "2"}, top_ks=[None], seeds=5, seed=7)
    drawn = [x for x in found.points if x.method == "random"]
    assert [x.name for x in drawn] == [f"random-e2-s{seed}" for seed in range(7, 12)]
    assert [x.seed for x in drawn] == list(range(7, 12))
    assert not any(x.control for x in drawn)


def test_without_controls_a_method_that_draws_has_the_seeds_asked_for() -> None:
    found = grid_of(methods=["random"], budgets={"2": "2"}, top_ks=[1], seeds=1, controls=False)
    assert names(found) == ["random-e2-k1-s0"]


def test_what_cannot_be_served_is_skipped_with_its_reason() -> None:
    found = grid_of(budgets={"1": "1", "2": "2", "5": "5"}, top_ks=[2, 3], controls=False)
    assert names(found) == ["reap-e2-k2"]
    reasons = {x.name: x.reason for x in found.skipped}
    assert reasons.keys() == {f"reap-e{e}-k{k}" for e in (1, 2, 5) for k in (2, 3)} - {"reap-e2-k2"}
    assert "keeps 1 of 4 experts, expected at least 2" in reasons["reap-e1-k2"]
    assert "top_k is 3, expected 1 to 2" in reasons["reap-e2-k3"]
    assert "experts is 5, expected 1 to 4" in reasons["reap-e5-k2"]


def test_methods_that_need_rows_are_skipped_without() -> None:
    found = grid_of(methods=["reap", "weight-norm"], calibrated=False, budgets={"2": "2"})
    asked = {"weight-norm-e2-k1", "weight-norm-e2-k2"}
    assert set(names(found)) == asked | {f"random-e2-k{k}-s{s}" for k in (1, 2) for s in range(3)}
    skipped = {x.name: x.reason for x in found.skipped}
    assert skipped["reap-e2-k1"] == "method reap needs calibration rows: found none"
    assert "frequency-e2-k2" in skipped


def test_methods_that_search_are_one_plan_each() -> None:
    found = grid_of(
        methods=["eep"], searches={"eep"}, budgets={"2": "2"}, top_ks=[1], controls=False
    )
    assert names(found) == ["eep-e2-k1"]


def test_a_list_of_counts_is_one_budget() -> None:
    found = grid_of(budgets={"mix": (2, 4)}, top_ks=[1], controls=False)
    assert [(x.name, x.budget) for x in found.points] == [("reap-emix-k1", (2, 4))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["raep"]}, "method is 'raep', expected one of .*did you mean 'reap'"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seed": -1}, "seed is 0"),
        ({"calibrated": False}, "nothing that can be run; reap-e2-k1: method reap needs"),
        ({"budgets": {"9": "9"}}, "nothing that can be run; reap-e9-k1: layer 0"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        grid_of(**changes)
