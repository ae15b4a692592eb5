from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveprune.pruning.errors import ConflictError, DataError, EngineError, PlanError
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_io import load_plan, save_plan
from liveprune.pruning.search.evaluator import SearchCancelledError
from liveprune.pruning.search.genome import make_space
from liveprune.pruning.search.presets import PRESETS, Settings
from liveprune.pruning.search.result import SearchResult
from liveprune.pruning.search.run import Progress
from tests.pruning.search.fakes import FakeTask, spec_of

Search = Callable[..., SearchResult]

TARGET = ((0, 3), (1, 2))
"""The best pruning: one pair for each of the two layers."""


def overlap(plan: Plan | None, row: int) -> float:
    """Grows with what each layer has of the target; merges gain as W_EM rows halve."""
    if plan is None:
        return 0.75
    total = 0.0
    for layer, target in zip(plan.layers, TARGET, strict=True):
        if layer.merge is None:
            total += 0.15 * len(set(layer.kept) & set(target))
        else:
            wanted = np.zeros((2, 4))
            wanted[[0, 1], list(target)] = 0.9
            total += 0.3 + 0.15 * math.exp(-5 * float(np.abs(layer.merge - wanted).mean()))
    return total + 0.0001 * (row % 10)


def same(plan: Plan | None, row: int) -> float:
    return 0.5


def sets(fitness: Any, *, binary: bool = False) -> dict[str, FakeTask]:
    return {
        "train": FakeTask(fitness, 60, "train", binary=binary),
        "dev": FakeTask(fitness, 40, "dev", binary=binary),
        "test": FakeTask(fitness, 50, "test", binary=binary),
    }


def facts(result: SearchResult) -> dict[str, Any]:
    """Everything but the time it took."""
    form = result.to_json()
    del form["cost"]["wall_seconds"], form["cost"]["cpu_seconds"]
    return form


def test_both_stages_and_all_that_is_reported(run_search: Search, tmp_path: Path) -> None:
    seen: list[Progress] = []
    data = sets(overlap)
    result = run_search(**data, progress=seen.append, seed=3)
    prune, merge = result.stages
    assert [layer.kept for layer in prune.plan.layers] == list(TARGET)
    assert merge.plan.merges
    assert result.plan is merge.plan
    assert merge.scores["dev"].mean > prune.scores["dev"].mean  # type: ignore[operator]
    # 0.15 for each of four experts and the mean of 0.0001 * (row % 10).
    assert prune.scores["dev"].mean == pytest.approx(0.60045)
    assert result.full["test"].mean == 0.75
    assert prune.differences["test"]["full"].difference == pytest.approx(0.60045 - 0.75)
    gain = merge.differences["dev"]["prune"]
    means = [x.scores["dev"].mean or 0.0 for x in (merge, prune)]
    assert gain.difference == pytest.approx(means[0] - means[1])
    assert [x.n for x in (*prune.scores.values(), *result.full.values())] == [60, 40, 50] * 2
    for score in merge.scores.values():
        assert score.low <= score.mean <= score.high  # type: ignore[operator]
    assert len(prune.finalists) <= 20
    assert [x.dev for x in merge.finalists] == sorted(
        (x.dev for x in merge.finalists), reverse=True
    )
    assert merge.winner == merge.finalists[0].index

    blocks = [rows for names, rows in data["train"].calls if "full" not in names]
    assert sorted(blocks[0] + blocks[1] + blocks[2]) == list(range(60))
    assert blocks[0] != sorted(blocks[0])
    assert [x.index for x in result.curve] == list(range(48))
    assert [x.stage for x in result.curve] == ["prune"] * 24 + ["merge"] * 24
    bests = [x.best for x in result.curve if x.best is not None]
    assert bests == sorted(bests)
    assert len({name for names, _ in data["train"].calls for name in names}) == 1 + 48
    rows = sum(len(n) * len(r) for task in data.values() for n, r in task.calls)
    assert result.cost.rows == rows
    assert result.cost.calls == sum(len(task.calls) for task in data.values())

    assert [x.stage for x in seen][-2:] == ["test", "done"]
    assert [x.done for x in seen] == sorted(x.done for x in seen)
    assert (seen[-1].done, seen[-1].total, seen[-1].replaying) == (48, 48, False)
    assert seen[-1].best == bests[-1]

    lineage = merge.plan.lineage
    assert (lineage.method, lineage.seed, lineage.calibration) == ("eep", 3, data["train"].digest)
    assert lineage.scores == {name: score.mean for name, score in merge.scores.items()}
    assert lineage.parameters["stage"] == "merge"
    save_plan(merge.plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == merge.plan


def test_test_rows_are_touched_once_at_the_end(run_search: Search) -> None:
    order: list[str] = []
    data = sets(overlap)
    for name, task in data.items():
        task.before = lambda plans, name=name: order.append(name)  # type: ignore[misc]
    result = run_search(**data)
    assert order.count("test") == 1
    assert order[-1] == "test"
    ((names, rows),) = data["test"].calls
    assert names == ["full", *(stage.plan.digest for stage in result.stages)]
    assert len(set(names)) == 3
    assert rows == list(range(50))


def test_json_is_plain(run_search: Search) -> None:
    result = run_search(**sets(overlap))
    form = result.to_json()
    assert json.loads(json.dumps(form, allow_nan=False)) == form
    assert form["stages"][0]["layers"][0] == {
        "layer": 0,
        "experts": 4,
        "top_k": 1,
        "kept": [0, 3],
        "merge": None,
        "router_map": None,
    }
    merged = next(x for x in form["stages"][1]["layers"] if x["merge"])
    assert np.shape(merged["merge"]) == np.shape(merged["router_map"]) == (2, 4)
    assert form["groups"] == [[0], [1]]
    assert form["data"]["dev"]["rows"] == 40
    assert form["parameters"]["experts"] == 2


def every_pruning(run_experts: int, keep: int) -> list[Plan]:
    from itertools import combinations, product

    from liveprune.pruning.search.genome import Genome, one_hot

    space = make_space(spec_of(run_experts), Settings(), experts=keep)
    plans = []
    for choice in product(combinations(range(run_experts), keep), repeat=2):
        rows = tuple(one_hot(ids, run_experts) for ids in choice)
        plans.append(space.plan(Genome(rows, rows)))
    return plans


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("experts", "keep"), [(4, 2), (3, 2), (3, 1)])
def test_pruning_finds_what_brute_force_finds(
    run_search: Search, preset: str, experts: int, keep: int
) -> None:
    """Fitness is a random number for each of the 36 or 9 prunings: no slope leads to the best."""
    plans = every_pruning(experts, keep)
    drawn = np.random.default_rng(experts).permutation(len(plans)) / len(plans)
    table = {plan.digest: float(value) for plan, value in zip(plans, drawn, strict=True)}
    best = max(plans, key=lambda plan: table[plan.digest])

    def fitness(plan: Plan | None, row: int) -> float:
        return 0.5 if plan is None else table[plan.digest]

    result = run_search(
        **sets(fitness),
        of=experts,
        experts=keep,
        settings=Settings(
            **{**vars(PRESETS[preset]), "merge": False, "inits": 20, "prune_candidates": 200}
        ),
    )
    assert result.plan == best
    assert len(result.curve) == len(plans)


def test_merging_climbs_to_a_known_optimum(run_search: Search) -> None:
    """One coefficient per new expert is best at 0.5; nothing else matters."""

    def fitness(plan: Plan | None, row: int) -> float:
        if plan is None or not plan.merges:
            return 0.2
        gaps = [
            float(np.abs(x.merge[:, 0] - 0.5).mean()) if x.merge is not None else 1.0
            for x in plan.layers
        ]
        return float(np.clip(0.9 - 0.5 * np.mean(gaps), 0, 1))

    settings = Settings(inits=6, prune_candidates=12, merge_candidates=400, scale=0.15, groups=1)
    result = run_search(**sets(fitness), settings=settings)
    coefficients = result.plan.layers[0].merge
    assert coefficients is not None
    assert np.abs(coefficients[:, 0] - 0.5).mean() < 0.1


def test_merge_is_never_below_prune_on_dev(run_search: Search) -> None:
    """Merging fools the train rows only."""

    def bad(plan: Plan | None, row: int) -> float:
        return 0.1 if plan and plan.merges else 0.6

    train = FakeTask(lambda plan, row: 0.9 if plan and plan.merges else 0.6)
    result = run_search(train=train, dev=FakeTask(bad, name="dev"))
    prune, merge = result.stages
    assert merge.winner == prune.winner
    assert merge.scores["dev"].mean == 0.6
    assert "prune" not in merge.differences["dev"]
    assert merge.differences["dev"]["train_best"].difference == pytest.approx(0.5)
    assert merge.differences["dev"]["train_best"].z is None


def test_all_alike_terminates(run_search: Search) -> None:
    result = run_search(**sets(same))
    assert len(result.curve) == 48
    assert {x.state for x in result.curve} == {"complete"}
    assert result.stages[0].winner == 0


def test_a_space_smaller_than_the_budget_terminates(run_search: Search) -> None:
    seen: list[Progress] = []
    settings = Settings(groups=1, merge_candidates=5)
    result = run_search(FakeTask(same), of=3, settings=settings, progress=seen.append)
    assert [x.stage for x in result.curve] == ["prune"] * 3 + ["merge"] * 5
    assert (seen[-1].done, seen[-1].total) == (8, 8)


def test_all_experts_kept_is_merging_only(run_search: Search) -> None:
    result = run_search(**sets(same), experts=4)
    (merge,) = result.stages
    assert merge.name == "merge"
    assert len(result.curve) == 24
    assert all(layer.is_identity for layer in merge.plan.layers)  # nothing was better
    assert [layer.top_k for layer in merge.plan.layers] == [1, 1]
    assert set(merge.differences["test"]) == {"full"}


def test_pruning_only(run_search: Search) -> None:
    result = run_search(**sets(overlap), settings=Settings(inits=8, merge=False))
    assert [stage.name for stage in result.stages] == ["prune"]


def test_without_dev_a_part_of_train_is_put_aside(run_search: Search) -> None:
    train = FakeTask(overlap, 50)
    result = run_search(train)
    assert {name: about["rows"] for name, about in result.data.items()} == {"train": 35, "dev": 15}
    rows = {True: set(), False: set()}  # type: ignore[var-annotated]
    for _, asked in train.calls:
        # Only re-selection and the full model are asked for all dev rows at once.
        rows[len(asked) == 15].update(asked)
    assert len(rows[True]) == 15
    assert not rows[True] & rows[False]
    assert rows[True] | rows[False] == set(range(50))


def test_seeds(run_search: Search, tmp_path: Path) -> None:
    first, again, other = (
        facts(run_search(**sets(overlap, binary=True), seed=seed, folder=tmp_path / name))
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert first == again
    assert first["curve"] != other["curve"]


def test_what_fails_stays_behind(run_search: Search) -> None:
    """Prunings that keep expert 0 crash the engine, those that keep 1 give NaN."""

    def before(plans: Any) -> None:
        if any(plan and not plan.merges and 0 in plan.layers[0].kept for plan in plans):
            raise EngineError("illegal memory access")

    def fitness(plan: Plan | None, row: int) -> float:
        return np.nan if plan and 1 in plan.layers[0].kept else overlap(plan, row)

    data = sets(fitness)
    for task in data.values():
        task.before = before
    result = run_search(**data)
    failed = [x for x in result.curve if x.state == "failed"]
    assert {x.failure for x in failed} >= {
        "illegal memory access",
        "25 of 25 values are not finite",
    }
    assert all(x.mean is None for x in failed)
    assert result.stages[0].plan.layers[0].kept == (2, 3)


def test_resumed_after_every_single_call(run_search: Search, tmp_path: Path) -> None:
    """Stopped at each call of the engine in turn, and resumed, it ends the same."""
    unbroken = run_search(**sets(overlap, binary=True), folder=tmp_path / "unbroken")

    class StopError(Exception):
        pass

    stops = 0
    while True:
        data = sets(overlap, binary=True)
        calls = [0]

        def before(plans: Any, calls: list[int] = calls) -> None:
            calls[0] += 1
            if calls[0] == 2:
                raise StopError

        for task in data.values():
            task.before = before
        try:
            result = run_search(**data)
        except StopError:
            stops += 1
        else:
            break
    assert stops > 20
    assert facts(result) == facts(unbroken)
    assert result.plan.lineage == unbroken.plan.lineage


def test_cancel_and_go_on(run_search: Search, tmp_path: Path) -> None:
    cancel = threading.Event()
    data = sets(overlap)
    data["train"].before = lambda plans: cancel.set() if len(data["train"].calls) == 5 else None
    with pytest.raises(SearchCancelledError, match="go on from here"):
        run_search(**data, cancel=cancel)
    assert len(data["train"].calls) == 5
    seen: list[Progress] = []
    result = run_search(**sets(overlap), progress=seen.append)
    assert [x.replaying for x in seen] == sorted((x.replaying for x in seen), reverse=True)
    assert facts(result) == facts(run_search(**sets(overlap), folder=tmp_path / "other"))


def test_a_dead_engine_ends_it_and_a_living_one_goes_on(run_search: Search, tmp_path: Path) -> None:
    data = sets(overlap)

    def dead(plans: Any) -> None:
        if len(data["train"].calls) > 5:
            raise EngineError("worker died")

    data["train"].before = dead
    with pytest.raises(EngineError, match="run it again to go on"):
        run_search(**data)
    result = run_search(**sets(overlap))
    assert facts(result) == facts(run_search(**sets(overlap), folder=tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0, now is 1"),
        ({"experts": 3}, r"method\.experts was 2, now is 3"),
        ({"settings": Settings(scale=0.1)}, r"method\.scale was 0\.065, now is 0\.1"),
        ({"dev": None}, r"data\.dev was '\w+', now is None"),
        ({"test": FakeTask(same, 51, "test")}, r"data\.test was '\w+', now is '\w+'"),
    ],
)
def test_another_search_in_the_folder_is_refused(
    run_search: Search, changes: dict[str, Any], message: str
) -> None:
    data = sets(same)
    settings = Settings(inits=2, prune_candidates=2, merge_candidates=1)
    run_search(**data, settings=settings)
    data = sets(same)
    with pytest.raises(DataError, match=message):
        run_search(**{**data, "settings": settings, **changes})
    assert not data["train"].calls


def test_another_model_is_refused(run_search: Search) -> None:
    settings = Settings(inits=2, prune_candidates=2, merge_candidates=1)
    run_search(**sets(same), settings=settings)
    with pytest.raises(DataError, match=r"model was '\w+', now is '\w+'"):
        run_search(**sets(same), of=5, settings=settings)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train": FakeTask(same, 0)}, DataError, "train: found 0 rows, expected at least 1"),
        ({"test": FakeTask(same, 0, "test")}, DataError, "test: found 0 rows"),
        (
            {"train": FakeTask(same, 1), "dev": None},
            DataError,
            "expected at least 2, a part of which becomes dev",
        ),
        ({"dev": FakeTask(same, 60, "train")}, DataError, "the same rows as"),
        ({"experts": 1, "top_k": 2}, PlanError, "top_k"),
        ({"seed": -1}, PlanError, "seed is -1"),
    ],
)
def test_refused_before_anything_is_scored_or_written(
    run_search: Search, tmp_path: Path, changes: dict[str, Any], error: type, message: str
) -> None:
    data = {**sets(same), **changes}
    with pytest.raises(error, match=message):
        run_search(**data)
    assert not (tmp_path / "search").exists()
    assert not any(x.calls for x in data.values() if isinstance(x, FakeTask))


def test_measures_must_agree(run_search: Search) -> None:
    data = sets(same)
    data["dev"].measure = "exact"
    with pytest.raises(DataError, match="dev: measured by 'exact', expected 'choice'"):
        run_search(**data)


def test_a_folder_in_use_is_refused(run_search: Search) -> None:
    data = sets(same)
    inner: list[type] = []

    def before(plans: Any) -> None:
        if not inner:
            inner.append(ConflictError)
            with pytest.raises(ConflictError, match="another search at work"):
                run_search(**sets(same))

    data["train"].before = before
    run_search(**data)
    assert inner


def test_a_full_model_without_numbers_is_an_error(run_search: Search) -> None:
    with pytest.raises(EngineError, match="the full model cannot be scored on train: 60 of 60"):
        run_search(**sets(lambda plan, row: np.nan if plan is None else 0.5))


def test_who_fails_on_test_is_reported(run_search: Search) -> None:
    data = sets(overlap)
    data["test"].fitness = lambda plan, row: np.nan if plan and not plan.merges else 0.5
    prune, merge = run_search(**data).stages
    assert prune.scores["test"].failure == "50 of 50 values are not finite"
    assert prune.scores["test"].mean is None
    assert prune.differences["test"] == {}
    assert set(merge.differences["test"]) == {"full"}


def test_a_search_can_start_from_given_prunings(run_search: Search, tmp_path: Path) -> None:
    settings = Settings(groups="each", merge=False, inits=1, prune_candidates=1)
    layers = tuple(LayerPlan(i, 4, 1, target) for i, target in enumerate(TARGET))
    start = Plan("mixtral", 2, layers, Lineage("reap"))
    found = run_search(
        **sets(overlap), settings=settings, starts={"reap": start}, folder=tmp_path / "s"
    )
    assert found.plan == start
    assert found.plan.lineage.method == "eep"
    assert found.parameters["starts"] == {"reap": start.digest}
    with pytest.raises(DataError, match="starts"):
        run_search(**sets(overlap), settings=settings, folder=tmp_path / "s")
    with pytest.raises(PlanError, match="expected none where all experts stay"):
        run_search(**sets(overlap), starts={"reap": start}, experts=4, folder=tmp_path / "t")
