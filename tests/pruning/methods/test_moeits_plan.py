"""MoEITS from a checkpoint to a plan, against the published code's choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_io import load_plan, save_plan
from liveprune.pruning.prune import make_plan


def kept(plan: Plan) -> list[tuple[int, ...]]:
    return [layer.kept for layer in plan.layers]


def golden_moeits(shared: Path, name: str) -> dict[str, Any]:
    meta = json.loads((shared / "golden" / "moeits" / "meta.json").read_text())
    factors: dict[str, Any] = meta["models"][name]["factors"]
    return factors


@pytest.mark.parametrize(("name", "top_k"), [("mixtral_rand", 2), ("qwen2moe_rand", 4)])
def test_moeits_at_tau_equals_the_official_choice(shared: Path, name: str, top_k: int) -> None:
    """But for the floor: the published code would keep one expert at tau = -1."""
    model = shared / "golden" / "ckpt" / name
    for factor, result in golden_moeits(shared, name).items():
        plan = make_plan(model, method="moeits", tau=float(factor))
        expected = result["float32"]["keep"]
        if factor == "-1.0":
            assert [layer.kept_experts for layer in plan.layers] == [top_k] * 3
            for layer, ids in zip(plan.layers, expected, strict=True):
                assert set(ids) <= set(layer.kept)
        else:
            assert kept(plan) == [tuple(ids) for ids in expected]
        # The same counts as a list, and the same choice.
        counts = [layer.kept_experts for layer in plan.layers]
        assert kept(make_plan(model, method="moeits", experts=counts)) == kept(plan)


def test_moeits_tells_what_it_did(shared: Path, tmp_path: Path) -> None:
    model = shared / "golden" / "ckpt" / "mixtral_rand"
    factors = golden_moeits(shared, "mixtral_rand")
    steps: list[tuple[int, int]] = []
    plan = make_plan(model, method="moeits", tau=0.5, progress=lambda *s: steps.append(s))
    assert steps == [(done, 252) for done in range(1, 253)]  # 28 pairs, 3 matrices, 3 layers
    lineage = plan.lineage
    assert (lineage.parameters["tau"], lineage.parameters["nmi"]) == (0.5, "plain")
    assert (lineage.parameters["experts"], lineage.seed) == (None, None)
    for index, told in lineage.scores["removals"].items():
        limit = factors["0.5"]["threshold_f32"][int(index)]
        assert told["threshold"] == pytest.approx(limit, abs=1e-6)
        assert told["stopped_by"] == "threshold"
        assert set(told["removed"][:3]) == set(range(8)) - set(plan.layers[int(index)].kept)
        assert told["nmi"][2] > limit >= told["nmi"][3]
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    collapsed = make_plan(model, method="moeits", tau=-1.0)
    told = collapsed.lineage.scores["removals"]
    assert {item["stopped_by"] for item in told.values()} == {"floor"}
    counted = make_plan(model, method="moeits", experts=5, nmi="shuffled", seed=3)
    assert counted.lineage.seed == 3
    assert {x["stopped_by"] for x in counted.lineage.scores["removals"].values()} == {"budget"}


def test_moeits_skips_layers_and_lowers_top_k(shared: Path) -> None:
    model = shared / "golden" / "ckpt" / "mixtral_rand"
    plan = make_plan(model, method="moeits", tau=-1.0, top_k=1, skip_layers=[1])
    expected = golden_moeits(shared, "mixtral_rand")["-1.0"]["float32"]["keep"]
    assert kept(plan) == [tuple(expected[0]), tuple(range(8)), tuple(expected[2])]
    assert sorted(plan.lineage.scores["removals"]) == ["0", "2"]
