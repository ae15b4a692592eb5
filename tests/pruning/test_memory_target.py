from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint
from liveprune.pruning.errors import PlanError
from liveprune.pruning.memory_target import Costs, LayerCost, budget_for
from liveprune.pruning.prune import make_plan
from tests.pruning.test_budget import grouped_spec, spec_of

MakeModel = Callable[..., Path]


def size(model: Path) -> int:
    return sum(entry.size for entry in read_checkpoint(model).tensors.values())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_the_checkpoint_is_within_and_one_more_expert_is_not(
    tiny_model: MakeModel, tmp_path: Path, family: str, allocate: str
) -> None:
    model = tiny_model(family)
    least = make_plan(model, method="weight-norm", experts=2)
    apply_plan(model, least, tmp_path / "least")
    target = (size(model) + size(tmp_path / "least")) // 2
    plan = make_plan(model, method="weight-norm", target_memory=target, allocate=allocate)
    apply_plan(model, plan, tmp_path / "out")
    found = size(tmp_path / "out")
    removed = sum(layer.experts - layer.kept_experts for layer in plan.layers)
    one = (size(model) - found) // removed
    step = one * (len(plan.layers) if allocate == "uniform" else 1)
    assert found <= target < found + step
    assert plan.lineage.parameters["target_memory"] == target


def test_refusals(tiny_model: MakeModel) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(PlanError, match=r"target_memory is 1,000 bytes, expected at least \d"):
        make_plan(model, method="weight-norm", target_memory=1000)
    with pytest.raises(PlanError, match="there is nothing to prune"):
        make_plan(model, method="weight-norm", target_memory=10**9)
    with pytest.raises(PlanError, match="found both experts and target_memory"):
        make_plan(model, method="weight-norm", experts=4, target_memory=10**6)


@given(st.data())
def test_never_above_the_target(data: st.DataObject) -> None:
    """Layers of other sizes, groups, skipped layers, gates that stay."""
    grouped = data.draw(st.booleans())
    spec = grouped_spec() if grouped else spec_of()
    unit = spec.router.groups
    costs = Costs(
        {
            layer.index: LayerCost(
                layer.experts,
                data.draw(st.integers(1, 50)),
                data.draw(st.integers(0, 5)),
                data.draw(st.integers(0, 9)),
                data.draw(st.integers(0, 1)),
            )
            for layer in spec.layers
        },
        fixed=data.draw(st.integers(0, 100)),
    )
    full = {layer.index: layer.experts for layer in spec.layers}
    floors = dict.fromkeys(full, 2 * unit)
    skip = data.draw(st.sets(st.sampled_from(sorted(full)), max_size=2))
    target = data.draw(st.integers(0, 4000))
    allocate = data.draw(st.sampled_from(["uniform", "global"]))
    try:
        budget = budget_for(costs, spec, target, floors=floors, skip_layers=skip, allocate=allocate)
    except PlanError:
        return
    open_layers = [i for i in full if i not in skip]
    if budget.counts is not None:
        counts: dict[int, int] = dict(zip(full, budget.counts, strict=True))
        assert all(counts[i] >= floors[i] and counts[i] % unit == 0 for i in open_layers)
        assert costs.bytes_of(counts) <= target
        return
    assert budget.total is not None
    assert budget.total % unit == 0
    # Wherever they go: to the dearest layers first, which is the worst.
    left = budget.total - sum(floors[i] for i in open_layers)
    assert left >= 0
    counts = {i: full[i] if i in skip else floors[i] for i in full}
    for i in sorted(open_layers, key=lambda i: -costs.layers[i].expert):
        more = min(left, full[i] - counts[i] - unit)
        counts[i] += more
        left -= more
    assert costs.bytes_of(counts) <= target


def test_what_snaps_to_multiples(tiny_model: MakeModel) -> None:
    options: dict[str, Any] = {"method": "weight-norm", "allowed_counts": {2, 4, 6}}
    plan = make_plan(tiny_model("mixtral"), experts=5, **options)
    assert [layer.kept_experts for layer in plan.layers] == [4, 4, 4]
    plan = make_plan(tiny_model("mixtral"), experts=5, allocate="global", **options)
    counts = [layer.kept_experts for layer in plan.layers]
    assert set(counts) <= {2, 4, 6, 8}
    assert sum(counts) <= 15
