from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.run import search
from tests.pruning.search.conftest import Search
from tests.pruning.search.fakes import FakeTask
from tests.pruning.search.report_page import checked_page


def flat(plan: Plan | None, row: int) -> float:
    return 0.5


def test_literal_pruning_is_drawn_as_pruning(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Qwen2-MoE does not renormalise: its prunings are router maps of one-hot rows."""
    model = tiny_model("qwen2_moe", num_experts=4, norm_topk_prob=False)
    settings = Settings(inits=4, prune_candidates=4, merge=False)

    result = search(
        model,
        ModelSpec.from_path(model),
        None,  # type: ignore[arg-type]
        train=FakeTask(flat, 30),  # type: ignore[arg-type]
        folder=tmp_path / "search",
        experts=2,
        settings=settings,
    ).to_json()
    layer = result["stages"][0]["layers"][0]
    assert layer["kept"] is None
    kept = sorted(row.index(1.0) for row in layer["merge"])
    page = checked_page(result, tmp_path / "report.html")
    assert "the router does not renormalise" in page.text
    table = next(x for x in page.tables if x.caption.startswith("Kept experts"))
    assert table.rows[0][1] == ", ".join(map(str, kept))


def test_large_model(run_search: Search, tmp_path: Path) -> None:
    """48 layers of 60 experts, in 12 groups; half pruned, half merged to 30."""
    settings = Settings(inits=4, prune_candidates=8, merge_candidates=8)
    result = run_search(FakeTask(flat, 30), settings=settings).to_json()
    rng = np.random.default_rng(0)
    result["groups"] = [list(range(i, i + 4)) for i in range(0, 48, 4)]
    for stage in result["stages"]:
        stage["digest"] = stage["name"]
        stage["layers"] = []
    for group in result["groups"]:
        kept = sorted(rng.choice(60, 30, replace=False).tolist())
        matrices = rng.normal(0, 0.6, (2, 30, 60))
        matrices[0, 0, 0] = 7.25
        pruned = {"experts": 60, "top_k": 4, "kept": kept, "merge": None, "router_map": None}
        merged = {"merge": matrices[0].tolist(), "router_map": matrices[1].tolist()}
        for layer in group:
            result["stages"][0]["layers"].append({"layer": layer, **pruned})
            form = pruned | {"kept": None} | merged if layer >= 24 else pruned
            result["stages"][1]["layers"].append({"layer": layer, **form})
    page = checked_page(result, tmp_path / "report.html")
    assert "with 30 of 60 experts in every layer and 4 active per token" in page.text
    assert "up to 7.2" in page.text
    assert page.svg("kept-prune").path_count("kept") == 12 * 30
    assert page.svg("kept-prune").path_count("removed") == 12 * 30
    assert page.svg("kept-merge").path_count("kept") == 6 * 30
    for name in ("merge", "router_map"):
        drawn = [page.svg(f"{name}-merge-{i}") for i in range(6)]
        assert [x.words[0] for x in drawn] == [
            f"{name} of layers {i}\N{EN DASH}{i + 3}" for i in range(24, 48, 4)
        ]
        first = np.array(result["stages"][1]["layers"][24][name])
        assert drawn[0].path_count("positive") == (first > 0).sum()
        assert drawn[0].path_count("negative") == (first < 0).sum()
    assert len(page.source) < 1_000_000
