"""NAEE against brute force: blocks of the stock model with experts physically removed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveprune.pruning.calibration.rows import Rows
from liveprune.pruning.errors import PlanError
from liveprune.pruning.plan import Plan
from liveprune.pruning.prune import make_plan
from tests import reference
from tests.pruning.removed_experts import Blocks

MakeModel = Callable[..., Path]
ROWS = Rows(tuple(np.random.default_rng(0).integers(0, 128, n) for n in (9, 5, 12, 3)))
BATCH = 20
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("mixtral", {}, 4),
    ("qwen2_moe", {}, 6),
    ("deepseek_v3", {"n_group": 2, "topk_group": 1}, 4),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1}, 5),
]


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = (json.dumps({"input_ids": row.tolist()}) for row in ROWS.token_ids)
    path.write_text("\n".join(lines))
    return path


def naee(model: Path, rows: Path, experts: Any, **arguments: Any) -> Plan:
    options = {"batch_tokens": BATCH, **arguments.pop("options", {})}
    return make_plan(
        model, method="naee", experts=experts, calibration=rows, options=options, **arguments
    )


def sets_of(keep: int, groups: int) -> list[tuple[int, ...]]:
    size = 8 // groups
    return [
        x
        for x in itertools.combinations(range(8), keep)
        if len({sum(i // size == g for i in x) for g in range(groups)}) == 1
    ]


@pytest.mark.parametrize(("family", "overrides", "keep"), CASES)
@pytest.mark.parametrize("top_k", [None, 1])
def test_equals_brute_force(
    tiny_model: MakeModel,
    calibration: Path,
    family: str,
    overrides: dict[str, Any],
    keep: int,
    top_k: int | None,
) -> None:
    model = tiny_model(family, **overrides)
    plan = naee(model, calibration, keep, top_k=top_k)
    blocks = Blocks(model, ROWS)
    batches = ROWS.batches(BATCH)
    assert len(batches) == 3
    sets = sets_of(keep, overrides.get("n_group", 1))
    for layer in plan.layers:
        losses = sorted(
            (blocks.loss(layer.layer, kept, layer.top_k, batches), kept) for kept in sets
        )
        scores = plan.lineage.scores[str(layer.layer)]
        assert layer.kept == losses[0][1]
        assert layer.top_k == (top_k or 2)
        assert scores["sets"] == len(sets)
        assert scores["runner_up"]["kept"] == list(losses[1][1])
        found = [scores["loss"], scores["runner_up"]["loss"]]
        np.testing.assert_allclose(found, [x for x, _ in losses[:2]], rtol=1e-4)


def test_greedy_equals_a_plain_greedy(tiny_model: MakeModel, calibration: Path) -> None:
    model = tiny_model("qwen2_moe")
    plan = naee(model, calibration, 4, options={"strategy": "greedy"})
    blocks = Blocks(model, ROWS)
    for layer in plan.layers:
        kept = list(range(8))
        while len(kept) > 4:
            losses = {
                gone: blocks.loss(
                    layer.layer, [i for i in kept if i != gone], 2, ROWS.batches(BATCH)
                )
                for gone in kept
            }
            kept.remove(min(losses, key=lambda e: losses[e]))
        assert list(layer.kept) == kept
        assert plan.lineage.scores[str(layer.layer)]["sets"] == 1 + 8 + 7 + 6 + 5


def test_progressive_equals_brute_force(tiny_model: MakeModel, calibration: Path) -> None:
    """Each layer gets what the layers pruned so far give, by a model pruned that far."""
    for family in ("mixtral", "deepseek_v3"):
        overrides = {} if family == "mixtral" else {"n_group": 2, "topk_group": 1}
        model = tiny_model(family, **overrides)
        plan = naee(model, calibration, 4, options={"progressive": True})
        blocks = Blocks(model, ROWS)
        pruned = Blocks(model, ROWS)
        chosen = []
        for layer in plan.layers:
            inputs, _ = pruned.passed()
            losses = {
                kept: blocks.loss(layer.layer, kept, 2, ROWS.batches(BATCH), inputs[layer.layer])
                for kept in sets_of(4, overrides.get("n_group", 1))
            }
            kept = min(losses, key=lambda x: losses[x])
            assert layer.kept == kept
            found = plan.lineage.scores[str(layer.layer)]["loss"]
            assert found == pytest.approx(losses[kept], rel=1e-4)
            reference._prune_block(pruned.model.model.layers[layer.layer].mlp, layer)
            chosen.append(kept)
        alone = naee(model, calibration, 4)
        assert alone.layers[0].kept == chosen[0]
        assert alone.lineage.scores != plan.lineage.scores


def test_auto_turns_greedy_where_there_are_too_many_sets(
    tiny_model: MakeModel, calibration: Path
) -> None:
    model = tiny_model("mixtral")
    plan = naee(model, calibration, "4,7,8", options={"max_sets": 69})
    tried = [plan.lineage.scores[str(i)]["sets"] for i in range(3)]
    assert tried == [1 + 8 + 7 + 6 + 5, 8, 1]
    assert [layer.kept_experts for layer in plan.layers] == [4, 7, 8]
    assert "runner_up" not in plan.lineage.scores["2"]


def test_skipped_layers_are_left_out(tiny_model: MakeModel, calibration: Path) -> None:
    model = tiny_model("mixtral")
    whole = naee(model, calibration, 4)
    plan = naee(model, calibration, 4, skip_layers=[0, 2], top_k=1)
    assert [(x.kept_experts, x.top_k) for x in plan.layers] == [(8, 2), (4, 1), (8, 2)]
    assert list(plan.lineage.scores) == ["1"]
    assert whole.lineage.parameters["batch_tokens"] == BATCH


def test_dense_layers_pass_through(tiny_model: MakeModel, calibration: Path) -> None:
    model = tiny_model("qwen2_moe", mlp_only_layers=[1])
    for progressive in (False, True):
        plan = naee(model, calibration, 6, options={"progressive": progressive})
        assert [x.layer for x in plan.layers] == [0, 2]


def test_progress(tiny_model: MakeModel, calibration: Path) -> None:
    seen: list[tuple[int, int]] = []
    naee(tiny_model("mixtral"), calibration, 4, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_bfloat16_finds_a_set_nearly_as_good(tiny_model: MakeModel, calibration: Path) -> None:
    narrow = naee(tiny_model("mixtral", dtype="bfloat16"), calibration, 4)
    wide = naee(tiny_model("mixtral"), calibration, 4)
    blocks = Blocks(tiny_model("mixtral"), ROWS)
    for one, other in zip(narrow.layers, wide.layers, strict=True):
        losses = [blocks.loss(x.layer, x.kept, 2, ROWS.batches(BATCH)) for x in (one, other)]
        assert losses[0] <= losses[1] * 1.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allocate": "global"}, "method naee: allocate is 'global', expected 'uniform' or a list"),
        ({"options": {"strategy": "best"}}, "strategy is 'best', expected one of auto, enumerate"),
        ({"options": {"max_sets": 0}}, "max_sets is 0, expected at least 1"),
        ({"options": {"batch_tokens": 0}}, "batch_tokens is 0, expected at least 1"),
        (
            {"options": {"strategy": "enumerate", "max_sets": 69}},
            "layer 0 has 70 sets of 4 experts, expected at most max_sets = 69",
        ),
        ({"options": {"progressive": 1}}, "progressive is 1, expected a value like False"),
        ({"keep_super_experts": True}, "naee: found keep_super_experts, expected none"),
    ],
)
def test_refusals(
    tiny_model: MakeModel,
    calibration: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(
        "liveprune.pruning.methods.naee.StreamedModel", lambda *_: pytest.fail("was run")
    )
    with pytest.raises(PlanError, match=message):
        naee(tiny_model("mixtral"), calibration, 4, **arguments)
