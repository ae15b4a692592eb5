from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liveprune.pruning.errors import PlanError
from liveprune.pruning.foreign import read_any_plan, write_llm_compressor_report
from liveprune.pruning.foreign.reports import layer_index
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan

DEEPSEEK = ModelSpec.from_config(
    {
        "model_type": "deepseek_v2",
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "moe_intermediate_size": 32,
        "n_routed_experts": 10,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
    }
)
WHOLE = tuple(range(10))


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.3.mlp.experts", 3),
        ("model.layers.13.mlp", 13),
        ("layers.3", 3),
        ("model.language_model.layers.7.mlp", 7),
        ("model.decoder_layers.3.mlp", None),
        ("model.layers.x.mlp", None),
        ("model.layers.3x", None),
        ("3", None),
    ],
)
def test_layer_index(name: str, index: int | None) -> None:
    assert layer_index(name) == index


def test_a_report_names_kept_ids_by_real_layer_index(tmp_path: Path) -> None:
    report = {"model.layers.2.mlp": [9, 0, 4], "model.layers.3.mlp.experts": [5, 6, 7, 8]}
    plan = read_any_plan(write(tmp_path / "report.json", report), DEEPSEEK)
    assert [(x.layer, x.kept, x.top_k) for x in plan.layers] == [
        (1, WHOLE, 3),
        (2, (0, 4, 9), 3),
        (3, (5, 6, 7, 8), 3),
    ]
    assert plan.lineage.method == "llm-compressor-report"


def test_top_k_is_lowered_on_request_only(tmp_path: Path) -> None:
    path = write(tmp_path / "report.json", {"model.layers.2.mlp": [4, 5]})
    with pytest.raises(PlanError, match=r"layer 2: keeps 2 experts, .* model's top-k = 3; pass"):
        read_any_plan(path, DEEPSEEK)
    assert [x.top_k for x in read_any_plan(path, DEEPSEEK, top_k=3).layers] == [3, 2, 3]
    assert [x.top_k for x in read_any_plan(path, DEEPSEEK, top_k=1).layers] == [1, 1, 1]
    with pytest.raises(PlanError, match="layer 1: top_k is 4, expected at most the model's 3"):
        read_any_plan(path, DEEPSEEK, top_k=4)
    with pytest.raises(PlanError, match="top_k is 0, expected at least 1"):
        read_any_plan(path, DEEPSEEK, top_k=0)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"model.layers.0.mlp": [1, 2, 3]}, r"states the layers \[0\], .* experts in \[1, 2, 3\]"),
        ({"model.layers.9.mlp": [1, 2, 3]}, r"states the layers \[9\]"),
        ({"model.layers.1.mlp": []}, "layer 1: keeps 0 experts, expected at least"),
        ({"model.layers.1.mlp": [1, 2, 10]}, r"layer 1: found kept ids \[10\], expected 0 to 9"),
        ({"model.layers.1.mlp": [1, 1, 2]}, r"layer 1: found kept ids \[1, 1, 2\]"),
        ({"model.layers.1.mlp": [1, 2.5]}, "layer 1: found .*, expected a list of expert ids"),
        ({"model.layers.1.mlp": [True]}, "layer 1: found .*, expected a list of expert ids"),
        ({"model.layers.1.mlp": {"kept": [1]}}, "layer 1: found .*, expected a list of expert"),
        ({"model.layers.1.mlp": [1], "sparsity": 0.5}, "'sparsity' names no layer, expected e.g."),
        (
            {"model.layers.1.mlp": [1], "model.layers.1.mlp.experts": [1]},
            "layer 1: named twice, the second time as 'model.layers.1.mlp.experts'",
        ),
    ],
)
def test_unusable_reports_are_refused(tmp_path: Path, report: object, message: str) -> None:
    path = write(tmp_path / "report.json", report)
    with pytest.raises(PlanError, match=message) as caught:
        read_any_plan(path, DEEPSEEK)
    assert str(caught.value).startswith(f"{path}: ")


def test_groups_are_checked(tmp_path: Path) -> None:
    grouped = ModelSpec.from_config(
        {**DEEPSEEK.config, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}
    )
    path = write(tmp_path / "report.json", {"model.layers.1.mlp": [0, 1, 2, 5]})
    with pytest.raises(PlanError, match=r"layer 1: keeps \[3, 1\] experts in its 2 groups"):
        read_any_plan(path, grouped)


KEPT = st.sets(st.integers(0, 9), min_size=1).map(lambda s: tuple(sorted(s)))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kept=st.tuples(KEPT, KEPT, KEPT), top_k=st.integers(1, 3))
def test_round_trip(tmp_path: Path, kept: tuple[tuple[int, ...], ...], top_k: int) -> None:
    layers = tuple(
        LayerPlan(i, 10, min(top_k, len(ids)), kept=ids) for i, ids in enumerate(kept, 1)
    )
    plan = Plan("deepseek_v2", 4, layers, Lineage("reap"))
    path = tmp_path / "report.json"
    write_llm_compressor_report(plan, path)
    assert json.loads(path.read_text())["model.layers.1.mlp"] == list(kept[0])
    assert read_any_plan(path, DEEPSEEK, top_k=top_k) == plan


FOUR = np.eye(10, dtype=np.float32)[:4]


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (LayerPlan(2, 10, 3, (0, 1, 2, 3), merge=FOUR), "merge"),
        (LayerPlan(2, 10, 3, merge=FOUR, router_map=FOUR), "merge, router_map"),
        (LayerPlan(2, 10, 3, merge=FOUR, expert_map=(*range(4), *[3] * 6)), "merge, expert_map"),
        (LayerPlan(2, 10, 3, (0, 4), constants=np.ones((8, 5))), "constants"),
        (
            LayerPlan(2, 10, 1, (4,), neuron_map=np.zeros((10, 1), int), neuron_shares=np.ones(10)),
            "neuron_map, neuron_shares",
        ),
    ],
)
def test_more_than_kept_ids_does_not_fit_a_report(
    layer: LayerPlan, found: str, tmp_path: Path
) -> None:
    plan = Plan("deepseek_v2", 4, (layer,), Lineage("eep"))
    with pytest.raises(PlanError, match=f"layer 2: found {found}; .* states kept ids only"):
        write_llm_compressor_report(plan, tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_the_architecture_of_a_report_is_known(tmp_path: Path) -> None:
    odd = Plan("other", 1, (LayerPlan(0, 4, 1, kept=(0, 1)),), Lineage("x"))
    with pytest.raises(PlanError, match="architecture is 'other', expected one of deepseek_v2"):
        write_llm_compressor_report(odd, tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


RANKING = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]


def rows(**changes: Any) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"layer": i, "experts": RANKING} for i in (1, 2, 3)]
    made[1].update(changes)
    return [{k: v for k, v in row.items() if v is not ...} for row in made]


@pytest.mark.parametrize("layer_key", ["layer", "layer_idx", "layer_id"])
@pytest.mark.parametrize("key", ["experts", "ranking", "ranked_experts", "expert_ids"])
def test_ranked_rows(tmp_path: Path, layer_key: str, key: str) -> None:
    ranked = [{layer_key: i, key: RANKING} for i in (3, 1, 2)]
    path = write_rows(tmp_path / "ranked.jsonl", ranked)
    plan = read_any_plan(path, DEEPSEEK, ratio=0.5)
    assert [x.kept for x in plan.layers] == [(0, 1, 3, 4, 5)] * 3
    assert plan.lineage.method == "ranked-jsonl"
    assert plan.lineage.parameters == {"source": "ranked.jsonl", "ratio": 0.5}
    assert read_any_plan(write(tmp_path / "list.json", ranked), DEEPSEEK, ratio=0.5) == plan


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [(0.0, 10), (0.05, 9), (0.1, 9), (0.25, 7), (0.3, 7), (0.5, 5), (0.7, 3), (0.9, 1)],
)
def test_the_ratio_is_the_fraction_removed_and_the_kept_count_is_rounded_down(
    tmp_path: Path, ratio: float, kept: int
) -> None:
    path = write_rows(tmp_path / "ranked.jsonl", rows())
    plan = read_any_plan(path, DEEPSEEK, ratio=ratio, top_k=1)
    assert [x.kept for x in plan.layers] == [tuple(sorted(RANKING[:kept]))] * 3
    with pytest.raises(PlanError, match="layer 1: found no kept experts"):
        read_any_plan(path, DEEPSEEK, ratio=0.95, top_k=1)


def test_a_single_row(tmp_path: Path) -> None:
    spec = ModelSpec.from_config({**DEEPSEEK.config, "num_hidden_layers": 2})
    path = write_rows(tmp_path / "ranked.jsonl", [{"layer": 1, "experts": RANKING}])
    assert read_any_plan(path, spec, ratio=0.7).layers[0].kept == (1, 3, 4)


@pytest.mark.parametrize(
    ("ranked", "ratio", "message"),
    [
        (rows(), None, "experts are ranked, not chosen; pass ratio"),
        (rows(), 1.0, "ratio is 1.0, expected the fraction to remove"),
        (rows(), -0.1, "ratio is -0.1"),
        (rows(), float("nan"), "ratio is nan"),
        (rows(), 0.8, "layer 1: keeps 2 experts, expected at least the model's top-k = 3"),
        (rows()[:2], 0.5, r"found no row for the layers \[3\]"),
        ([*rows(), rows()[0]], 0.5, "row 4: layer 1 is ranked a second time"),
        ([*rows(), {"layer": 0, "experts": RANKING}], 0.5, r"states the layers \[0\]"),
        (rows(layer="2"), 0.5, "row 2: layer is '2', expected a number"),
        (rows(layer=...), 0.5, r"row 2: found the keys \['experts'\], expected one of \('layer'"),
        (rows(experts=...), 0.5, r"row 2: found the keys \['layer'\], expected one of \('experts'"),
        (rows(ranking=RANKING), 0.5, "row 2: found the keys .* expected one of"),
        (rows(experts=RANKING[:9]), 0.5, "layer 2: found the ranking .*, expected every expert"),
        (rows(experts=[*RANKING, 10]), 0.5, "layer 2: 11 experts are ranked, the model has 10"),
        (rows(experts="0123456789"), 0.5, "layer 2: found .*, expected a list of expert ids"),
    ],
)
def test_unusable_rankings_are_refused(
    tmp_path: Path, ranked: list[dict[str, Any]], ratio: float | None, message: str
) -> None:
    path = write_rows(tmp_path / "ranked.jsonl", ranked)
    with pytest.raises(PlanError, match=message) as caught:
        read_any_plan(path, DEEPSEEK, ratio=ratio)
    assert str(caught.value).startswith(f"{path}: ")
