"""Pruned checkpoints in real vLLM engines compute what the reference computes.

The reference is stock transformers with the plan carried out on its modules (tests/reference.py).
Greedy tokens must be equal, log-probabilities of the prompts within ``TOLERANCE``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e import cases
from tests.e2e.conftest import COMPILED, STOCK
from tests.e2e.engine import Outcome
from tests.e2e.rewritten import REWRITTEN

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

TOLERANCE = 1e-4
"""Largest difference of a log-probability; all computes in float32."""
LATENT_TOLERANCE = 5e-4
"""For DeepSeek, whose attention vLLM computes in another order (a projection moves to the query)
and whose tiny models are wider."""
ALL = [(model, plan) for model in cases.MODELS for plan in ("base", *cases.plans_of(model))]
Expected = Callable[[str, str], dict[str, Any]]


def worst_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of a prompt's log-probability."""
    return max(
        abs(found - right)
        for ours, theirs in zip(one["logprobs"], other["logprobs"], strict=True)
        for found, right in zip(ours, theirs, strict=True)
    )


def check(outcome: Outcome, answers: dict[str, Any], model: str) -> None:
    latent = model.startswith("deepseek")
    assert outcome.error == ""
    assert outcome.cold == answers["tokens"]
    assert outcome.warm == answers["tokens"]
    if not latent:  # vLLM's CPU build has no prefix cache for latent attention
        assert outcome.cached == [0, 0, 32, 64], "the second run must read the prefix cache"
    worst = worst_difference({"logprobs": outcome.logprobs}, answers)
    print(f"worst log-probability difference: {worst:.2e}")
    assert worst < (LATENT_TOLERANCE if latent else TOLERANCE)


@pytest.mark.parametrize(("model", "plan"), ALL)
def test_eager(model: str, plan: str, eager: dict[str, Outcome], expected: Expected) -> None:
    check(eager[f"{model}/{plan}"], expected(model, plan), model)


@pytest.mark.parametrize(("model", "plan"), COMPILED)
def test_compiled(model: str, plan: str, compiled: dict[str, Outcome], expected: Expected) -> None:
    check(compiled[f"{model}/{plan}"], expected(model, plan), model)


@pytest.mark.parametrize(("model", "plan"), STOCK)
def test_base_and_uniform_plan_run_in_vllm_without_the_plugin(
    model: str, plan: str, stock: dict[str, Outcome], eager: dict[str, Outcome]
) -> None:
    """And under the plugin nothing differs: same classes, same tokens, same numbers."""
    bare, ours = stock[f"{model}/{plan}"], eager[f"{model}/{plan}"]
    assert bare.error == ""
    assert ours.classes == bare.classes
    assert ours.layers is None
    assert ours.cold == bare.cold
    assert ours.warm == bare.warm
    assert ours.logprobs == bare.logprobs


@pytest.mark.parametrize("name", REWRITTEN)
def test_other_spellings_of_the_counts(
    name: str, eager: dict[str, Outcome], expected: Expected
) -> None:
    model = REWRITTEN[name].model
    check(eager[name], expected(model, "counts"), model)
    assert eager[name].layers == eager[f"{model}/counts"].layers
    assert eager[name].logprobs == eager[f"{model}/counts"].logprobs


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_identity_merge_is_pruning_where_weights_are_renormalised(
    model: str, eager: dict[str, Outcome], expected: Expected
) -> None:
    """One-hot rows in both matrices. Elsewhere the old softmax keeps the pruned experts' share."""
    check(eager[f"{model}/identity"], expected(model, "counts"), model)


@pytest.mark.parametrize("model", cases.MODELS)
def test_the_reference_tells_the_plans_apart(model: str, expected: Expected) -> None:
    """Else equality with it would prove nothing."""
    plans = ["base", *cases.plans_of(model)]
    if model in ("mixtral", "qwen3_moe"):
        plans.remove("identity")  # equal to ``counts`` where weights are renormalised
    for one, other in itertools.combinations(plans, 2):
        assert worst_difference(expected(model, one), expected(model, other)) > 0.1, (one, other)


def test_only_layers_with_a_router_map_get_another_router(eager: dict[str, Outcome]) -> None:
    ours = "liveprune.patches.router_map.RouterMapRouter"
    routers = {
        plan: {
            cls
            for name, cls in eager[f"mixtral/{plan}"].classes.items()
            if name.endswith(".router")
        }
        for plan in ("base", "counts", "router_map")
    }
    assert routers["router_map"] == {ours}
    assert routers["counts"] == routers["base"] != {ours}


def test_layers_show_their_own_counts(eager: dict[str, Outcome]) -> None:
    assert eager["mixtral/counts"].layers == {
        "0": [5, 2, 0, ""],
        "1": [7, 2, 0, ""],
        "2": [1, 1, 0, ""],
    }
    assert eager["mixtral/router_map"].layers == {
        "0": [4, 2, 8, "router_map"],
        "1": [8, 1, 8, "router_map"],
        "2": [2, 2, 8, "router_map"],
    }
    assert eager["deepseek_v2/counts"].layers == {
        "1": [5, 2, 0, ""],
        "2": [7, 2, 0, ""],
        "3": [1, 1, 0, ""],
    }
