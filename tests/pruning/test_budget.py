from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liveprune.pruning.allocation import allocate_global, global_total, select
from liveprune.pruning.budget import Budget, LayerRange, layer_budgets, parse_budget
from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import ModelSpec, Router
from liveprune.pruning.plan_guards import check_groups

PLAIN = Router("softmax", renormalise=True)


def spec_of(experts: int = 8, top_k: int = 2, layers: int = 4) -> ModelSpec:
    return ModelSpec.from_config(
        {
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": top_k,
            "num_hidden_layers": layers,
            "hidden_size": 8,
            "intermediate_size": 8,
        }
    )


def grouped_spec(
    experts: int = 16, top_k: int = 4, groups: int = 4, top_groups: int = 2
) -> ModelSpec:
    """DeepSeek-V3 with experts in the layers 1 to 3; a group's score sums its best two."""
    return ModelSpec.from_config(
        {
            "model_type": "deepseek_v3",
            "n_routed_experts": experts,
            "num_experts_per_tok": top_k,
            "n_group": groups,
            "topk_group": top_groups,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 1,
            "hidden_size": 8,
            "moe_intermediate_size": 8,
        }
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4, Budget(count=4)),
        ("4", Budget(count=4)),
        (0.5, Budget(fraction=Fraction(1, 2))),
        ("0.9", Budget(fraction=Fraction(9, 10))),
        (1, Budget(count=1)),
        (1.0, Budget(fraction=Fraction(1))),
        ("4, 4,8", Budget(counts=(4, 4, 8))),
        ([4, 4, 8], Budget(counts=(4, 4, 8))),
        ((6,), Budget(counts=(6,))),
    ],
)
def test_parse(value: Any, expected: Budget) -> None:
    assert parse_budget(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        True,
        0.0,
        1.5,
        float("nan"),
        "",
        "half",
        "4,",
        "4,0",
        "1e-1",
        [],
        [4, 0],
        [4, 0.5],
        None,
    ],
)
def test_parse_refuses(value: Any) -> None:
    with pytest.raises(PlanError, match=r"experts is .*, expected a count such as 4"):
        parse_budget(value)


def keeps(spec: ModelSpec, experts: Any, **options: Any) -> list[int]:
    budget = parse_budget(experts)
    budgets = layer_budgets(spec, budget, **options)
    if options.get("allocate") == "global":
        global_total(budgets, budget, spec.router)
    return [b.keep for b in budgets]


def test_fraction_rounds_the_pruned_number_down() -> None:
    assert keeps(spec_of(), 0.5) == [4] * 4
    assert keeps(spec_of(experts=12), 0.75) == [9] * 4
    assert keeps(spec_of(experts=60, top_k=4), 0.5) == [30] * 4
    # 8 * (1 - 0.55) = 3.6 pruned, rounded down; 10 * (1 - 0.9) is 1 exactly, in decimals.
    assert keeps(spec_of(), 0.55) == [5] * 4
    assert keeps(spec_of(experts=10), 0.9) == [9] * 4


def test_lists_and_skipped_layers() -> None:
    assert keeps(spec_of(), [4, 5, 8, 6]) == [4, 5, 8, 6]
    assert keeps(spec_of(), 4, skip_layers=[0, 3]) == [8, 4, 4, 8]
    assert keeps(spec_of(), [8, 4, 4, 8], skip_layers=[0, 3]) == [8, 4, 4, 8]


def test_top_k_is_the_models_unless_asked_for() -> None:
    def top_ks(**options: Any) -> list[int]:
        return [b.top_k for b in layer_budgets(spec_of(), parse_budget(4), **options)]

    assert top_ks() == [2, 2, 2, 2]
    assert top_ks(top_k=1) == [1, 1, 1, 1]
    assert top_ks(top_k=1, skip_layers=[1]) == [1, 2, 1, 1]
    assert top_ks(top_k=[1, 2, 2, 1]) == [1, 2, 2, 1]
    assert keeps(spec_of(), [1, 2, 4, 8], top_k=[1, 2, 2, 2]) == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("experts", "options", "message"),
    [
        (1, {}, r"layer 0: keeps 1 of 8 experts, expected at least 2 \(top_k = 2"),
        (0.1, {"skip_layers": [0]}, r"layer 1: keeps 1 of 8"),  # 8 * 0.9 = 7.2 pruned
        (9, {}, "layer 0: experts is 9, expected 1 to 8"),
        ([4, 4], {}, r"experts lists 2 layers, expected the 4 with experts: \[0, 1, 2, 3\]"),
        ([4, 4, 1, 4], {}, "layer 2: keeps 1 of 8 experts"),
        ([4, 4, 4, 4], {"skip_layers": [1]}, r"layer 1: experts is 4, expected 8 \(skipped\)"),
        (4, {"skip_layers": [4]}, r"skip_layers is \[4\], expected some of the MoE layers"),
        (4, {"top_k": 3}, "layer 0: top_k is 3, expected 1 to 2"),
        (4, {"top_k": 0}, "layer 0: top_k is 0, expected 1 to 2"),
        (4, {"top_k": [2, 2]}, "top_k lists 2 layers, expected the 4"),
        (4, {"allocate": "even"}, "allocate is 'even', expected 'uniform' or 'global'"),
        ([4] * 4, {"allocate": "global"}, "allocate is 'global' and experts a list"),
        (1, {"allocate": "global"}, "experts: 4 kept in 4 layers, expected at least 8"),
    ],
)
def test_refusals(experts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        keeps(spec_of(), experts, **options)


def test_groups_keep_equal_and_sufficient_numbers() -> None:
    assert keeps(grouped_spec(), 8) == [8, 8, 8]
    # 4 * (1 - 0.6) = 1.6 pruned per group, rounded down.
    assert keeps(grouped_spec(), 0.6) == [12, 12, 12]
    with pytest.raises(PlanError, match="layer 1: experts is 10, expected a multiple of 4"):
        keeps(grouped_spec(), 10)
    with pytest.raises(PlanError, match=r"keeps 4 of 16 experts, expected at least 8 .*4 groups"):
        keeps(grouped_spec(), 4)
    # One expert a group is too few for a group's score even at top_k = 1.
    with pytest.raises(PlanError, match="expected at least 8"):
        keeps(grouped_spec(), 4, top_k=1)


def test_select_by_hand() -> None:
    scores = np.array([0.5, -np.inf, 2.0, 0.5, 1.0, np.inf])
    assert select(scores, 3, PLAIN, 0) == (2, 4, 5)
    assert select(scores, 4, PLAIN, 0) == (0, 2, 4, 5)  # of equals the lower id stays
    two_groups = Router("softmax", renormalise=True, groups=2)
    assert select(scores, 2, two_groups, 0) == (2, 5)
    assert select(scores, 4, two_groups, 0) == (0, 2, 4, 5)
    with pytest.raises(PlanError, match=r"layer 7: scores hold NaN at \[1\]"):
        select(np.array([0.0, np.nan]), 1, PLAIN, 7)


def test_global_allocation_by_hand() -> None:
    spec = spec_of(experts=4, top_k=1, layers=3)
    budget = parse_budget(3)
    budgets = layer_budgets(spec, budget, allocate="global", skip_layers=[2])
    total = global_total(budgets, budget, spec.router)
    assert total == 6
    scores = {
        0: np.array([10.0, 10.0, 10.0, 10.0]),  # all alike: shares 1
        1: np.array([0.0, 0.1, 0.1, 3.8]),  # one expert does the work: shares 0, 0.1, 0.1, 3.8
        2: np.zeros(4),
    }
    assert allocate_global(budgets, scores, total, spec.router) == {0: 4, 1: 2, 2: 4}
    # Shares, so a layer's scale does not matter.
    tiny = {**scores, 0: scores[0] * 1e-6}
    assert allocate_global(budgets, tiny, total, spec.router) == {0: 4, 1: 2, 2: 4}
    # Three experts of layer 1 come first, then its floor (top_k) stops it and layer 0 gives.
    assert allocate_global(budgets, scores, 4, spec.router) == {0: 3, 1: 1, 2: 4}


def test_global_fraction_is_taken_of_the_sum() -> None:
    budget = parse_budget(0.55)
    budgets = layer_budgets(spec_of(layers=3), budget, allocate="global")
    assert global_total(budgets, budget, PLAIN) == 24 - 10


def test_negative_scores_have_no_shares() -> None:
    budgets = layer_budgets(spec_of(layers=1), parse_budget(4), allocate="global")
    with pytest.raises(PlanError, match="layer 0: found the score -1"):
        allocate_global(budgets, {0: np.arange(-1.0, 7.0)}, 4, PLAIN)


SCORE = st.one_of(st.floats(0, 10), st.sampled_from([-np.inf, 0.0, 1.0]))


def draw_scores(data: st.DataObject, sizes: Sequence[int]) -> dict[int, np.ndarray]:
    return {
        i: np.array(data.draw(st.lists(SCORE, min_size=n, max_size=n))) for i, n in enumerate(sizes)
    }


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(1, 4), st.integers(1, 5))
def test_global_allocation_is_exact_and_respects_floors(
    data: st.DataObject, experts: int, top_k: int, layers: int
) -> None:
    top_k = min(top_k, experts)
    spec = spec_of(experts, top_k, layers)
    budget = Budget(count=data.draw(st.integers(top_k, experts)))
    skip = data.draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1))
    budgets = layer_budgets(spec, budget, allocate="global", skip_layers=skip)
    total = global_total(budgets, budget, spec.router)
    scores = draw_scores(data, [experts] * layers)
    counts = allocate_global(budgets, scores, total, spec.router)
    assert sum(n for i, n in counts.items() if i not in skip) == total
    assert all(counts[i] == experts for i in skip)
    for i, count in counts.items():
        assert top_k <= count <= experts
        kept = select(scores[i], count, spec.router, i)
        assert len(kept) == count
        assert list(kept) == sorted(set(kept))
        pruned = set(range(experts)) - set(kept)
        assert all(scores[i][p] <= scores[i][k] for p in pruned for k in kept)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(2, 5), st.integers(1, 4))
def test_group_guards_always_hold(
    data: st.DataObject, groups: int, size: int, top_groups: int
) -> None:
    top_groups = min(top_groups, groups)
    top_k = data.draw(st.integers(1, top_groups * size))
    spec = grouped_spec(groups * size, top_k, groups, top_groups)
    allocate = data.draw(st.sampled_from(["uniform", "global"]))
    budget = data.draw(
        st.one_of(
            st.integers(1, size).map(lambda n: Budget(count=n * groups)),
            st.fractions(Fraction(1, 10), 1).map(lambda f: Budget(fraction=f)),
        )
    )
    try:
        budgets = layer_budgets(spec, budget, allocate=allocate)
        total = global_total(budgets, budget, spec.router) if allocate == "global" else 0
    except PlanError:
        return  # refused before any pass: nothing to serve
    scores = {i + 1: s for i, s in draw_scores(data, [groups * size] * 3).items()}
    counts = {b.layer.index: b.keep for b in budgets}
    if allocate == "global":
        counts = allocate_global(budgets, scores, total, spec.router)
        assert sum(counts.values()) == total
    for i, count in counts.items():
        kept = select(scores[i], count, spec.router, i)
        assert len(kept) == count
        if count < groups * size:
            check_groups(kept, groups * size, top_k, spec.router, f"layer {i}")


def test_ranges_of_layers() -> None:
    spec = spec_of(layers=6)
    assert parse_budget("0-1:4,2:6,3-:8") == Budget(
        ranges=(LayerRange(0, 1, 4), LayerRange(2, 2, 6), LayerRange(3, None, 8))
    )
    assert keeps(spec, "0-1:4,2:6,3-:8") == [4, 4, 6, 8, 8, 8]
    assert keeps(grouped_spec(), "0-1:8,2-:16") == [8, 16, 16]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-1:4", "layer 2 is stated by nothing, expected one range"),
        ("0-2:4,2-:6", "layer 2 is stated by 0-2:4 and 2-:6, expected one range"),
        ("0-:4,9-12:6", "9-12:6 names no layer with experts"),
        ("0-x:4", "found '0-x:4', expected layers and a count"),
        ("0-:0", "expected layers and a count"),
        ("0-:9", "layer 0: experts is 9, expected 1 to 8"),
    ],
)
def test_wrong_ranges_are_named(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        keeps(spec_of(), text)


def test_bounds_of_a_layer_hold_under_global_allocation() -> None:
    """Unbounded, layer 0 would keep 8 and layer 1 its 2."""
    spec, budget = spec_of(layers=2), parse_budget(5)
    scores = {0: np.ones(8), 1: np.array([9.0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])}

    def counts(**bounds: int) -> dict[int, int]:
        budgets = layer_budgets(spec, budget, allocate="global", **bounds)
        return allocate_global(budgets, scores, global_total(budgets, budget, PLAIN), PLAIN)

    assert counts() == {0: 8, 1: 2}
    assert counts(least=3) == {0: 7, 1: 3}
    assert counts(most=6) == {0: 6, 1: 4}
    with pytest.raises(PlanError, match="max_experts is 3, expected at least 4"):
        counts(least=4, most=3)
    with pytest.raises(PlanError, match="10 kept in 2 layers, expected at most 8"):
        counts(most=4)
    with pytest.raises(PlanError, match="expected them with allocate 'global'"):
        layer_budgets(spec, budget, most=4)


def test_snapping_lowers_to_the_next_count_allowed() -> None:
    assert keeps(spec_of(), 7, allowed=[2, 4, 6]) == [6] * 4
    assert keeps(spec_of(), 8, allowed=[4]) == [8] * 4, "nothing is pruned, nothing to snap"
    assert keeps(spec_of(), 6, allowed=[6], skip_layers=[1]) == [6, 8, 6, 6]
    with pytest.raises(PlanError, match="layer 0: no count from 2 to 3 is allowed"):
        keeps(spec_of(), 3, allowed=[1, 4, 8])


@settings(max_examples=200)
@given(st.data())
def test_sums_are_exact_with_all_guards(data: st.DataObject) -> None:
    """Groups, floors, bounds and skipped layers together."""
    groups = data.draw(st.sampled_from([1, 2, 4]))
    size = data.draw(st.integers(2, 5))
    experts, top_groups = groups * size, data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    spec = grouped_spec(experts, top_k, groups, top_groups)
    skip = data.draw(st.sets(st.sampled_from([1, 2, 3]), max_size=2))
    bounds: dict[str, Any] = {
        "least": data.draw(st.none() | st.integers(1, experts)),
        "most": data.draw(st.none() | st.integers(1, experts)),
    }
    budget = Budget(count=data.draw(st.integers(1, size)) * groups)
    try:
        budgets = layer_budgets(spec, budget, allocate="global", skip_layers=skip, **bounds)
        total = global_total(budgets, budget, spec.router)
    except PlanError:
        return
    scores = {i + 1: s for i, s in draw_scores(data, [experts] * 3).items()}
    counts = allocate_global(budgets, scores, total, spec.router)
    assert sum(count for i, count in counts.items() if i not in skip) == total
    for item in budgets:
        count = counts[item.layer.index]
        assert count % groups == 0
        assert item.floor <= count <= item.ceiling or item.skipped
        assert count == experts or not item.skipped
        assert item.skipped or count >= min(experts, bounds["least"] or 1)
        assert item.skipped or bounds["most"] is None or count <= max(bounds["most"], 0)
