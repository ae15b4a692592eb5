from __future__ import annotations

import numpy as np
import pytest

from liveprune.pruning.errors import PlanError
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_guards import check_plan
from liveprune.pruning.search.genome import Genome, Space, make_space, one_hot, picked
from liveprune.pruning.search.presets import Settings
from tests.pruning.search.fakes import spec_of


def space_of(family: str = "mixtral", experts: int = 2, **changes: object) -> Space:
    spec = spec_of(family=family, norm_topk_prob=False)
    return make_space(spec, Settings(**changes), experts=experts)  # type: ignore[arg-type]


def genome(*rows: list[int], width: int = 4) -> Genome:
    matrices = tuple(one_hot(ids, width) for ids in rows)
    return Genome(matrices, matrices)


def test_one_hot_under_a_renormalising_router_is_a_pruning() -> None:
    space = space_of()
    plan = space.plan(genome([3, 1], [0, 2]))
    assert [x.kept for x in plan.layers] == [(1, 3), (0, 2)]
    assert not plan.merges
    assert plan == space.plan(genome([1, 3], [2, 0]))
    check_plan(plan, space.spec)


def test_literal_pruning_keeps_the_softmax_over_all_experts() -> None:
    space = space_of("qwen2_moe")
    assert space.literal
    plan = space.plan(genome([3, 1], [0, 2]))
    first = plan.layers[0]
    assert first.merge is not None
    assert first.merge.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert np.array_equal(first.merge, first.router_map)
    assert plan == space.plan(genome([1, 3], [2, 0]))
    check_plan(plan, space.spec)


def test_sliced_pruning_is_named() -> None:
    plan = space_of("qwen2_moe", semantics="slice").plan(genome([3, 1], [0, 2]))
    assert [x.kept for x in plan.layers] == [(1, 3), (0, 2)]


def test_nothing_dropped_is_the_model_itself() -> None:
    plan = space_of("qwen2_moe", experts=4).plan(genome([0, 1, 2, 3], [2, 1, 0, 3]))
    assert all(x.is_identity for x in plan.layers)


def test_everything_else_is_a_merge_as_written() -> None:
    merge = np.array([[0.5, 0.5, 0, 0], [0, 0, 1, 0]], np.float32)
    router = np.array([[1, 0, 0, 0], [0, 0, 1, -0.25]], np.float32)
    space = space_of(groups=1)
    for layer in space.plan(Genome((merge,), (router,))).layers:
        assert layer.kept == ()
        assert np.array_equal(layer.merge, merge)
        assert np.array_equal(layer.router_map, router)


@pytest.mark.parametrize(
    ("merge", "router_map", "expected"),
    [
        ([2, 0], [2, 0], (0, 2)),
        ([2, 0], [0, 2], None),  # the router's rows belong to the other experts
        ([2, 2], [2, 2], None),
    ],
)
def test_picked(merge: list[int], router_map: list[int], expected: tuple[int, ...] | None) -> None:
    assert picked(one_hot(merge, 4), one_hot(router_map, 4)) == expected
    assert picked(one_hot(merge, 4) * np.float32(0.5), one_hot(router_map, 4)) is None


@pytest.mark.parametrize(
    ("groups", "layers", "expected"),
    [
        (None, 6, [[0, 1], [2, 3], [4], [5]]),
        (None, 2, [[0], [1]]),
        (1, 3, [[0, 1, 2]]),
        (2, 5, [[0, 1, 2], [3, 4]]),
        ("each", 3, [[0], [1], [2]]),
    ],
)
def test_groups_are_runs_of_layers(
    groups: int | str | None, layers: int, expected: list[list[int]]
) -> None:
    settings = Settings(groups=groups)  # type: ignore[arg-type]
    space = make_space(spec_of(layers=layers), settings, experts=2)
    assert [group.layers for group in space.groups] == expected
    assert isinstance(space.plan(genome(*[[0, 1]] * len(expected))), Plan)


def test_layers_may_keep_different_numbers_in_groups_of_their_own() -> None:
    space = make_space(spec_of(layers=3), Settings(groups=2), experts=[2, 2, 3])
    assert [group.kept for group in space.groups] == [2, 3]
    with pytest.raises(PlanError, match=r"layers \[0, 1\] share matrices .* 2 of 4 and 3 of 4"):
        make_space(spec_of(layers=3), Settings(groups=2), experts=[2, 3, 3])


DEEPSEEK = spec_of(8, family="deepseek_v3")


@pytest.mark.parametrize(
    ("spec", "settings", "arguments", "message"),
    [
        (spec_of(top_k=2), Settings(), {"experts": 1}, "layer 0: keeps 1 of 4 .* at least 2"),
        (spec_of(), Settings(), {"experts": 2, "top_k": 2}, "layer 0: top_k is 2, expected 1 to 1"),
        (spec_of(), Settings(), {"experts": 5}, "layer 0: experts is 5, expected 1 to 4"),
        (spec_of(), Settings(groups=3), {"experts": 2}, "groups is 3, expected at most 2"),
        (spec_of(), Settings(merge=False), {"experts": 4}, "nothing to search"),
        (DEEPSEEK, Settings(), {"experts": 4}, r"merge is on: .* sigmoid in 2 group"),
        (
            DEEPSEEK,
            Settings(merge=False, semantics="literal"),
            {"experts": 4},
            "semantics is 'literal': .* expected 'slice'",
        ),
        (DEEPSEEK, Settings(merge=False), {"experts": 5}, "expected a multiple of 2"),
        (DEEPSEEK, Settings(merge=False), {"experts": 2}, "keeps 2 of 8 experts, expected at"),
    ],
)
def test_refused(spec: object, settings: Settings, arguments: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_space(spec, settings, **arguments)  # type: ignore[arg-type]


def test_a_model_with_router_maps_is_refused_even_if_only_merged() -> None:
    block = {"version": 1, "router_width": {"0": 4, "1": 4}}
    spec = spec_of(liveprune=block)
    with pytest.raises(PlanError, match="already has a router map"):
        make_space(spec, Settings(), experts=4)


def test_grouped_routers_are_pruned_by_slicing() -> None:
    space = make_space(DEEPSEEK, Settings(merge=False), experts=4)
    assert not space.literal
    plan = space.plan(genome([0, 3, 5, 7], [1, 2, 4, 6], width=8))
    check_plan(plan, DEEPSEEK)
    assert plan.layers[0].kept == (0, 3, 5, 7)


def test_fewer_active_experts() -> None:
    space = make_space(spec_of(top_k=2), Settings(), experts=1, top_k=1)
    assert [x.top_k for x in space.plan(genome([1], [2])).layers] == [1, 1]


def plan_of(kept: list[tuple[int, ...]], experts: int = 6) -> Plan:
    layers = tuple(LayerPlan(i, experts, 1, ids) for i, ids in enumerate(kept))
    return Plan("mixtral", len(kept), layers, Lineage("test"))


def test_the_closest_pruning_is_what_most_layers_of_a_group_keep() -> None:
    space = make_space(spec_of(6, layers=5), Settings(groups=2), experts=2)
    # Three layers, then two. Votes of the first: 0 once, 1 twice, 4 twice, 5 once; of the second
    # 3 twice, 0 and 5 once each: the lower one stays.
    genome = space.closest(plan_of([(0, 1), (1, 4), (4, 5), (3, 5), (0, 3)]))
    assert [layer.kept for layer in space.plan(genome).layers] == [(1, 4)] * 3 + [(0, 3)] * 2


def test_a_plan_of_the_space_is_closest_to_itself() -> None:
    space = make_space(spec_of(6, layers=3), Settings(groups="each"), experts=2)
    plan = plan_of([(0, 1), (2, 5), (3, 4)])
    assert space.plan(space.closest(plan)) == plan


def test_a_merging_plan_is_no_start() -> None:
    space = make_space(spec_of(6, layers=1), Settings(), experts=2)
    merged = LayerPlan(0, 6, 1, (0, 1), merge=one_hot([0, 1], 6) * 0.5)
    with pytest.raises(PlanError, match="start: found a plan that merges experts"):
        space.closest(Plan("mixtral", 1, (merged,), Lineage("test")))
