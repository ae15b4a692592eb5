from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import ModelSpec, Router
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_guards import check_groups, check_plan

HALF = np.eye(8, dtype=np.float32)[:4]
MIXTRAL = {
    "model_type": "mixtral",
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
V3 = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "moe_intermediate_size": 48,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}


def spec(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return ModelSpec.from_config({**config, **changes})


def plan(
    model: ModelSpec, change: Callable[[dict[str, Any]], None] | None = None, **whole: Any
) -> Plan:
    """The identity plan of ``model`` with layer 1 changed."""
    layers = []
    for base in model.layers:
        fields: dict[str, Any] = {
            "layer": base.index,
            "experts": base.experts,
            "top_k": base.top_k,
            "kept": tuple(range(base.experts)),
        }
        if base.index == 1 and change is not None:
            change(fields)
        layers.append(LayerPlan(**fields))
    whole = {"num_hidden_layers": model.num_hidden_layers, "layers": tuple(layers), **whole}
    whole.setdefault("architecture", model.architecture.model_type)
    return Plan(lineage=Lineage("x"), **whole)


def changed(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda layer: layer.update(fields)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (MIXTRAL, None),
        (MIXTRAL, changed(kept=(3, 7))),
        (MIXTRAL, changed(kept=(3,), top_k=1)),
        (MIXTRAL, changed(kept=(), merge=HALF, router_map=HALF)),
        (MIXTRAL, changed(kept=(0, 2, 4, 6), merge=HALF)),
        (V3, None),
        (V3, changed(top_k=1)),
        (V3, changed(kept=(0, 1, 4, 5, 10, 11, 13, 15))),
        (V3, changed(kept=(0, 1, 4, 5, 10, 11, 13, 15), merge=np.eye(16)[:8])),
    ],
)
def test_plans_that_fit(config: dict[str, Any], change: Any) -> None:
    model = spec(config)
    check_plan(plan(model, change), model)


def test_the_wrong_model_is_refused() -> None:
    model = spec(MIXTRAL)
    with pytest.raises(PlanError, match="made for 'olmoe', the model is 'mixtral'"):
        check_plan(plan(model, architecture="olmoe"), model)
    with pytest.raises(PlanError, match="made for 4 layers, the model has 3"):
        check_plan(plan(model, num_hidden_layers=4), model)
    with pytest.raises(PlanError, match="layer 0: the plan is for 6 experts, the model has 8"):
        check_plan(plan(spec(MIXTRAL, num_local_experts=6)), model)


def test_every_layer_with_experts_is_stated_and_no_other() -> None:
    model = spec(V3)
    whole = plan(model)
    with pytest.raises(PlanError, match=r"states the layers \[1\], the model .* in \[1, 2\]"):
        check_plan(plan(model, layers=whole.layers[:1]), model)
    dense = LayerPlan(0, 16, 4, kept=tuple(range(16)))
    with pytest.raises(PlanError, match=r"states the layers \[0, 1, 2\], the model has experts in"):
        check_plan(plan(model, layers=(dense, *whole.layers)), model)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (MIXTRAL, changed(top_k=3), "layer 1: top_k is 3, expected at most the model's 2"),
        (
            {**MIXTRAL, "per_layer_config": {"1": {"num_experts_per_tok": 1}}},
            changed(top_k=2),
            "layer 1: top_k is 2, expected at most the model's 1",
        ),
        (
            V3,
            changed(kept=(), merge=np.eye(16), router_map=np.eye(16)),
            r"layer 1: found a router map, expected none: .* by sigmoid in 4 group\(s\)",
        ),
        (
            {**V3, "n_group": 1, "topk_group": 1},
            changed(kept=(), merge=np.eye(16), router_map=np.eye(16)),
            r"by sigmoid in 1 group\(s\)",
        ),
        (
            {**V3, "scoring_func": "softmax"},
            changed(kept=(), merge=np.eye(16), router_map=np.eye(16)),
            r"by softmax in 4 group\(s\)",
        ),
        (
            V3,
            changed(kept=(0, 1, 2, 4, 5, 8, 9, 12, 13)),
            r"layer 1: keeps \[3, 2, 2, 2\] experts in its 4 groups, expected the same number",
        ),
        (
            V3,
            changed(kept=(0, 1, 4, 5, 8, 9)),
            r"layer 1: keeps \[2, 2, 2, 0\] experts in its 4 groups",
        ),
        (
            V3,
            changed(kept=(0, 4, 8, 12), top_k=2),
            r"layer 1: keeps 1 expert\(s\) per group, expected at least 2",
        ),
        (
            {**V3, "topk_group": 1},
            changed(kept=(0, 1, 4, 5, 8, 9, 12, 13)),
            "layer 1: 1 groups of 2 reach 2 experts, expected at least top_k = 4",
        ),
        (
            {**MIXTRAL, "liveprune": {"version": 1, "router_width": {"1": 12}}},
            changed(kept=(0, 1)),
            r"layer 1: this checkpoint already has a router map \(12 gate rows, 8 experts\)",
        ),
        (
            {
                **MIXTRAL,
                "liveprune": {
                    "version": 1,
                    "router_width": {"1": 9},
                    "router_mapping": {"1": "expert_map"},
                },
            },
            changed(kept=(0, 1), constants=np.ones((6, 32))),
            r"layer 1: this checkpoint already has an expert map \(9 gate rows, 8 experts\)",
        ),
        (
            {
                **MIXTRAL,
                "liveprune": {
                    "version": 1,
                    "router_width": {"1": 9},
                    "router_mapping": {"1": "constants"},
                },
            },
            changed(kept=(), merge=HALF, expert_map=(0, 1, 2, 3) * 2),
            r"layer 1: this checkpoint already has constant experts \(9 gate rows, 8 experts\)",
        ),
        (
            {**MIXTRAL, "liveprune": {"version": 1, "router_width": {"1": 8}}},
            changed(kept=(0, 1)),
            r"layer 1: this checkpoint already has a router map \(8 gate rows, 8 experts\)",
        ),
    ],
)
def test_plans_that_could_not_be_served(config: dict[str, Any], change: Any, message: str) -> None:
    model = spec(config)
    with pytest.raises(PlanError, match=message):
        check_plan(plan(model, change), model)


def test_deepseek_v2_groups_need_one_expert_each() -> None:
    model = spec(
        V3,
        model_type="deepseek_v2",
        topk_method="group_limited_greedy",
        num_experts_per_tok=2,
    )
    check_plan(plan(model, changed(kept=(0, 4, 8, 12))), model)


SIZES = st.lists(st.integers(1, 4), min_size=4, max_size=4)
SIZES |= st.integers(1, 4).map(lambda n: [n] * 4)


@given(
    top_groups=st.integers(1, 4),
    group_top=st.integers(1, 2),
    top_k=st.integers(1, 8),
    sizes=SIZES,
)
def test_groups_are_accepted_exactly_when_top_k_experts_are_always_reachable(
    top_groups: int, group_top: int, top_k: int, sizes: list[int]
) -> None:
    router = Router("softmax", True, 4, top_groups, group_top)  # noqa: FBT003
    kept = tuple(4 * group + i for group, size in enumerate(sizes) for i in range(size))
    equal = min(sizes) == max(sizes)
    fits = equal and sizes[0] >= group_top and top_groups * sizes[0] >= top_k
    try:
        check_groups(kept, 16, top_k, router, "layer 0")
        accepted = True
    except PlanError:
        accepted = False
    assert accepted == fits
