"""MoE-I2 from end to end: block-wise choice by brute force, counts, determinism, refusals."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liveprune.pruning.calibration.rows import Rows
from liveprune.pruning.errors import EngineError, PlanError
from liveprune.pruning.methods.moe_i2_counts import removal_counts
from liveprune.pruning.plan import LayerPlan, Plan
from liveprune.pruning.prune import make_plan
from tests import reference
from tests.pruning.removed_experts import Blocks

MakeModel = Callable[..., Path]
ROWS = Rows(tuple(np.random.default_rng(0).integers(0, 128, n) for n in (9, 5, 12, 3)))


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = (json.dumps({"input_ids": row.tolist()}) for row in ROWS.token_ids)
    path.write_text("\n".join(lines))
    return path


def moe_i2(model: Path, rows: Path, experts: Any = 4, **arguments: Any) -> Plan:
    return make_plan(model, method="moe-i2", experts=experts, calibration=rows, **arguments)


class Stack:
    """The hidden states of a stock model in float64, with experts removed from some layers."""

    def __init__(self, model: Path) -> None:
        self.model = Blocks(model, ROWS).model

    @torch.no_grad()
    def after(self, layer: int, plans: Sequence[LayerPlan]) -> list[Any]:
        """Of each row, after ``layer``."""
        pruned = copy.deepcopy(self.model)
        for plan in plans:
            reference._prune_block(pruned.model.layers[plan.layer].mlp, plan)
        found: list[Any] = []
        pruned.model.layers[layer].register_forward_hook(lambda _m, _a, out: found.append(out))
        for row in ROWS.token_ids:
            pruned(torch.from_numpy(row)[None])
        return found

    def loss(self, layer: int, plans: Sequence[LayerPlan]) -> float:
        """All rows are one batch."""
        pairs = zip(self.after(layer, plans), self.after(layer, []), strict=True)
        return float(sum(float((x - z).square().sum()) for x, z in pairs) ** 0.5)


@pytest.mark.parametrize(
    ("family", "overrides", "blocks"),
    [
        ("mixtral", {}, [(0, 1), (2,)]),
        # Layer 1 is dense and stands between.
        ("qwen2_moe", {"mlp_only_layers": [1]}, [(0, 2)]),
        ("deepseek_v3", {"n_group": 2, "topk_group": 1}, [(1, 2)]),
    ],
)
def test_blocks_equal_brute_force(
    tiny_model: MakeModel,
    calibration: Path,
    family: str,
    overrides: dict[str, Any],
    blocks: list[tuple[int, ...]],
) -> None:
    model = tiny_model(family, **overrides)
    plan = moe_i2(model, calibration, allocate="uniform")
    scores = plan.lineage.scores
    stack, alone = Stack(model), Blocks(model, ROWS)
    for block in blocks:
        candidates = []
        for index in block:
            best = scores[str(index)]["best"]
            assert len(best) == 3
            for found in best:
                loss = alone.loss(index, found["kept"], 2, ROWS.batches())
                assert found["loss"] == pytest.approx(loss, rel=1e-4)
            candidates.append([LayerPlan(index, 8, 2, tuple(x["kept"])) for x in best])
        losses = {x: stack.loss(block[-1], x) for x in itertools.product(*candidates)}
        wanted = min(losses, key=lambda x: losses[x])
        assert [plan.layer(x.layer).kept for x in wanted] == [x.kept for x in wanted]
        facts = scores[f"{block[0]}-{block[-1]}"]
        assert facts["combinations"] == 3 ** len(block)
        assert facts["loss"] == pytest.approx(losses[wanted], rel=1e-4)
        assert sorted(losses.values())[1] > losses[wanted] * 1.0001


def test_one_set_each_needs_no_block(tiny_model: MakeModel, calibration: Path) -> None:
    """Then it is NAEE."""
    model = tiny_model("mixtral")
    plan = moe_i2(model, calibration, allocate="uniform", options={"sets": 1})
    assert sorted(plan.lineage.scores) == ["0", "1", "2"]
    assert plan == make_plan(model, method="naee", experts=4, calibration=calibration)
    assert plan.lineage.scores["0"]["sets"] == 70


def test_counts_follow_the_importance(tiny_model: MakeModel, calibration: Path) -> None:
    model = tiny_model("mixtral")
    plan = moe_i2(model, calibration, experts=4)
    importance = plan.lineage.scores["importance"]
    assert [len(importance[str(i)]) for i in range(3)] == [8, 8, 8]
    removed = removal_counts(
        {i: sum(importance[str(i)]) for i in range(3)}, dict.fromkeys(range(3), 6), 12
    )
    assert [8 - x.kept_experts for x in plan.layers] == [removed[i] for i in range(3)]
    assert plan.lineage.parameters["allocate"] == "global"
    listed = moe_i2(model, calibration, experts=[x.kept_experts for x in plan.layers])
    assert listed == plan
    assert "importance" not in listed.lineage.scores


def test_skipped_layers(tiny_model: MakeModel, calibration: Path) -> None:
    plan = moe_i2(tiny_model("mixtral"), calibration, experts=5, skip_layers=[0, 2], top_k=1)
    assert [(x.kept_experts, x.top_k) for x in plan.layers] == [(8, 2), (5, 1), (8, 2)]
    assert sorted(plan.lineage.scores) == ["0-1", "1", "importance"]
    assert list(plan.lineage.scores["importance"]) == ["1"]
    whole = moe_i2(tiny_model("mixtral"), calibration, skip_layers=[0, 1, 2])
    assert [x.kept_experts for x in whole.layers] == [8, 8, 8]


def test_it_follows_its_seed(tiny_model: MakeModel, calibration: Path) -> None:
    model = tiny_model("olmoe")
    options = {"population": 4, "generations": 1, "block": 1}
    one, same, other = (
        moe_i2(model, calibration, allocate="uniform", seed=seed, options=options)
        for seed in (1, 1, 2)
    )
    assert one.lineage.scores == same.lineage.scores != other.lineage.scores
    assert one == same
    assert (one.lineage.seed, one.lineage.parameters["population"]) == (1, 4)
    assert one.lineage.scores["0"]["sets"] == 8


def test_progress(tiny_model: MakeModel, calibration: Path) -> None:
    seen: list[tuple[int, int]] = []
    moe_i2(tiny_model("mixtral"), calibration, progress=lambda *step: seen.append(step))
    assert seen == [(i, 3 + 3 + 2) for i in range(1, 9)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"population": 1}}, "moe-i2: population is 1, expected at least 2"),
        ({"options": {"sets": 0}}, "moe-i2: sets is 0, expected at least 1"),
        ({"options": {"mutation": 1.5}}, "mutation is 1.5, expected a probability"),
        ({"options": {"block": 2.0}}, "block is 2.0, expected a value like 2"),
    ],
)
def test_refusals(
    tiny_model: MakeModel, calibration: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        moe_i2(tiny_model("mixtral"), calibration, **arguments)


def test_groups_cannot_share_a_total(tiny_model: MakeModel, calibration: Path) -> None:
    model = tiny_model("deepseek_v3", n_group=2, topk_group=1)
    with pytest.raises(PlanError, match="picks among 2 groups, which cannot miss one expert"):
        moe_i2(model, calibration)


def test_rows_longer_than_the_model_takes_are_refused(
    tiny_model: MakeModel, calibration: Path
) -> None:
    model = tiny_model("mixtral", max_position_embeddings=8)
    with pytest.raises(EngineError, match="found 12 tokens with the answer, expected at most 8"):
        moe_i2(model, calibration)
