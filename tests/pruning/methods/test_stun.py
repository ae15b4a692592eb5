from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.calibration.weights import Weights
from liveprune.pruning.errors import PlanError
from liveprune.pruning.methods.stun_clusters import Join, clusters, cut, joins_at, smallest
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.prune import make_plan

MakeModel = Callable[..., Path]


def line(*places: float) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Distances of experts that lie on a line."""
    at = np.array(places)
    return np.abs(at[:, None] - at[None, :])


def test_joins_by_hand() -> None:
    """At 0, 1, 2.5, 9: the pair (1, 2) is next, but 0 and 2 are 2.5 apart."""
    distances = line(0, 1, 2.5, 9)
    assert joins_at(distances, 2.0, 1) == [Join(1.0, 0, 1)]
    assert joins_at(distances, 2.6, 1) == [Join(1.0, 0, 1), Join(1.5, 1, 2)]
    assert joins_at(distances, 2.6, 3) == [Join(1.0, 0, 1)]
    assert len(joins_at(distances, 10.0, 1)) == 3
    assert clusters(4, joins_at(distances, 2.6, 1)) == [[0, 1, 2], [3]]
    assert clusters(4, []) == [[0], [1], [2], [3]]


def test_a_pair_may_fit_where_a_closer_one_does_not() -> None:
    """(1, 2) would make 0, 1, 2 too wide; (2, 3) is farther apart and joins."""
    assert clusters(4, joins_at(line(0, 1, 2.5, 4.2), 2.0, 1)) == [[0, 1], [2, 3]]


def test_one_threshold_for_all_layers_and_an_exact_number() -> None:
    distances = {3: line(0, 1, 10), 5: line(0, 2, 4)}
    floors = {3: 1, 5: 1}
    assert smallest(distances, floors, 2) == np.nextafter(2.0, np.inf)
    joins = {i: joins_at(x, smallest(distances, floors, 2), 1) for i, x in distances.items()}
    assert {i: len(x) for i, x in cut(joins, 2).items()} == {3: 1, 5: 1}
    assert {i: len(x) for i, x in cut(joins, 1).items()} == {3: 1, 5: 0}


@given(st.lists(st.integers(0, 30), min_size=2, max_size=9), st.data())
def test_the_number_is_exact(places: list[int], data: st.DataObject) -> None:
    floor = data.draw(st.integers(1, len(places)))
    removals = data.draw(st.integers(0, len(places) - floor))
    distances, floors = {0: line(*places)}, {0: floor}
    threshold = smallest(distances, floors, removals)
    found = cut({0: joins_at(distances[0], threshold, floor)}, removals)[0]
    assert len(clusters(len(places), found)) == len(places) - removals
    for group in clusters(len(places), found):
        assert distances[0][np.ix_(group, group)].max() < threshold or len(group) == 1


def plain_representative(weights: Weights, layer: int, group: Sequence[int]) -> int:
    flat = [
        torch.cat([x.double().flatten() for x in weights.layers[layer].expert(i)]) for i in group
    ]
    mean = torch.stack(flat).mean(0)
    if len(group) == 2:
        return group[0]
    return group[int(torch.stack([(x - mean).norm() for x in flat]).argmin())]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_expert_nearest_to_the_mean_stands_for_its_cluster(
    tiny_model: MakeModel, family: str
) -> None:
    model = tiny_model(family)
    plan = make_plan(model, method="stun", experts=5)
    assert sum(layer.kept_experts for layer in plan.layers) == 15
    weights = Weights(model, ModelSpec.from_path(model))
    for layer in plan.layers:
        joins = [Join(d, a, b) for a, b, d in plan.lineage.scores["joins"][str(layer.layer)]]
        groups = clusters(8, joins)
        expected = sorted(plain_representative(weights, layer.layer, group) for group in groups)
        assert list(layer.kept) == expected
        assert (layer.merge is not None) == (bool(joins) and len(groups) <= 3)


def test_few_clusters_are_averaged(tiny_model: MakeModel) -> None:
    plan = make_plan(tiny_model("mixtral"), method="stun", experts=3, allocate="uniform")
    for layer in plan.layers:
        assert layer.merge is not None
        np.testing.assert_allclose(layer.merge.sum(axis=1), 1, rtol=1e-6)
        assert (np.count_nonzero(layer.merge, axis=0) == 1).all()
        for row, expert in zip(layer.merge, layer.kept, strict=True):
            assert row[expert] > 0


def test_experts_chosen_together_are_closer(tiny_model: MakeModel, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "The quick brown fox jumps over the lazy dog."}) + "\n")
    model = tiny_model("mixtral")
    plain = make_plan(model, method="stun", experts=5)
    same = make_plan(
        model,
        method="stun-coactivation",
        experts=5,
        calibration=rows,
        options={"coactivation": 0.0},
    )
    other = make_plan(
        model,
        method="stun-coactivation",
        experts=5,
        calibration=rows,
        options={"coactivation": 1e6},
    )
    assert same == plain
    assert other != plain


def test_groups_and_wrong_options_are_refused(tiny_model: MakeModel) -> None:
    with pytest.raises(PlanError, match="picks among 4 groups"):
        make_plan(
            tiny_model("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2),
            method="stun",
            experts=4,
        )
    with pytest.raises(PlanError, match="found parameter 'kappa', expected normalise"):
        make_plan(tiny_model("mixtral"), method="stun", experts=4, options={"kappa": 3})
    with pytest.raises(PlanError, match=r"average_up_to is 2\.5, expected a value like 3"):
        make_plan(tiny_model("mixtral"), method="stun", experts=4, options={"average_up_to": 2.5})
