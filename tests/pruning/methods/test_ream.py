"""REAM against plain loops in float64 over models whose earlier layers are merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from liveprune.pruning.calibration.rows import Rows
from liveprune.pruning.errors import PlanError
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.methods import METHODS, ream_alignment
from liveprune.pruning.methods.ream_alignment import Centroid, sample
from liveprune.pruning.methods.ream_groups import distances, owners, raised
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Lineage, Plan
from liveprune.pruning.prune import make_plan
from tests import reference

MakeModel = Callable[..., Path]
LENGTHS = (9, 4, 12)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"input_ids": generator.integers(3, 100, n).tolist()}) + "\n"
            for n in LENGTHS
        )
    )
    return path


def test_the_sample_does_not_hang_on_batches() -> None:
    rows = Rows(tuple(np.arange(100 * i, 100 * i + n) for i, n in enumerate(LENGTHS)))
    flat = np.concatenate(rows.token_ids)
    for batch_tokens in (1, 12, 24, 1000):
        batches = rows.batches(batch_tokens)
        for count, expected in ((5, flat[np.arange(5) * 25 // 5]), (99, flat)):
            taken = np.full(len(expected), -1)
            for batch, sampled in zip(batches, sample(rows, batches, count), strict=True):
                taken[sampled.places] = batch.input_ids.reshape(-1)[sampled.tokens]
            assert taken.tolist() == expected.tolist()


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.linalg.norm(one[:, None, :] - other[None, :, :], axis=2)


def plain_order(gate_up: Any, down: Any, i: int, j: int, inputs: Any) -> list[int]:
    """Expert ``i`` aligned to ``j``, in float64, from all tokens and whole matrices at once."""
    segments, fired = [], []
    for e in (i, j):
        gate, up = gate_up[e].double().chunk(2)
        segments.append(unit(torch.cat([gate, up, down[e].double().T], 1).numpy()))
        x = inputs.double()
        fired.append((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).T.numpy())
    theirs, ours = segments
    basis = np.linalg.svd(ours - ours.mean(0), full_matrices=False)[2][:64]
    costs = apart(unit(fired[0]), unit(fired[1])) + apart(theirs @ basis.T, ours @ basis.T)
    return linear_sum_assignment(costs)[1].tolist()


class Watched:
    """What the experts of one layer get and do in a model whose earlier layers are merged."""

    @torch.no_grad()
    def __init__(self, model: Path, merged: list[LayerPlan], index: int, rows: Path) -> None:
        spec = ModelSpec.from_path(model)
        later = [
            LayerPlan(x.index, x.experts, x.top_k, tuple(range(x.experts)))
            for x in spec.layers[len(merged) :]
        ]
        plan = Plan(spec.architecture.model_type, 3, (*merged, *later), Lineage("none"))
        running = reference.pruned_model(model, plan)
        mlp = running.model.layers[index].mlp
        calls: list[Any] = []
        logits: list[Any] = []
        mlp.experts.register_forward_pre_hook(lambda _m, args: calls.append(args))
        mlp.gate.register_forward_hook(lambda _m, _a, out: logits.append(out[0]))
        for line in rows.read_text().splitlines():
            running(torch.tensor([json.loads(line)["input_ids"]]))
        self.gate_up, self.down = mlp.experts.gate_up_proj.data, mlp.experts.down_proj.data
        self.inputs = torch.cat([x for x, _, _ in calls])
        ids, weights = (torch.cat([call[n] for call in calls]) for n in (1, 2))
        z = torch.cat(logits).double().numpy()
        self.products = z.T @ z
        experts, hidden = self.down.shape[:2]
        self.gated = np.zeros((experts, hidden))
        norms: list[list[float]] = [[] for _ in range(experts)]
        for t, x in enumerate(self.inputs):
            for e, g in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
                gate, up = (self.gate_up[e].double() @ x.double()).chunk(2)
                f = self.down[e].double() @ (torch.nn.functional.silu(gate) * up)
                self.gated[e] += g * f.numpy()
                norms[e].append(g * float(f.norm()))
        self.saliency = np.array([np.mean(x) if x else -np.inf for x in norms])


CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("qwen2_moe", {}),
    ("deepseek_v3", {"n_group": 2, "topk_group": 1}),
]


@pytest.mark.parametrize(("family", "overrides"), CASES)
@pytest.mark.parametrize("stay", [False, True])
def test_equals_plain_loops(
    tiny_model: MakeModel, rows: Path, family: str, overrides: dict[str, Any], *, stay: bool
) -> None:
    """Layer by layer; each sees what the merged layers before it make of the rows."""
    model = tiny_model(family, **overrides)
    plan = make_plan(
        model,
        method="ream",
        experts=4,
        calibration=rows,
        keep_gate_rows=stay,
        options={"group_size": 3},
    )
    for place, layer in enumerate(plan.layers):
        seen = Watched(model, list(plan.layers[:place]), layer.layer, rows)
        found = plan.lineage.scores[str(layer.layer)]
        found = [-np.inf if x is None else x for x in found]
        np.testing.assert_allclose(found, seen.saliency, rtol=1e-3)
        parts = overrides.get("n_group", 1)
        centroids = [
            int(i)
            for part in np.arange(8).reshape(parts, -1)
            for i in part[np.argsort(-seen.saliency[part])[: 4 // parts]]
        ]
        owned = owners(
            distances(seen.gated, seen.products), raised(seen.saliency), sorted(centroids), 3
        )
        assert plan.lineage.scores["groups"][str(layer.layer)] == owned.tolist()
        assert len(set(owned.tolist())) == 4
        new = np.searchsorted(np.unique(owned), owned)
        assert layer.expert_map == (tuple(new.tolist()) if stay else ())
        assert layer.kept == (() if stay else tuple(sorted(centroids)))
        assert layer.neuron_map is not None
        assert layer.neuron_shares is not None
        np.testing.assert_allclose(layer.neuron_shares, raised(seen.saliency), rtol=1e-3)
        ffn = layer.neuron_map.shape[1]
        for i, row in enumerate(layer.neuron_map.tolist()):
            order = list(range(ffn))
            if owned[i] != i:
                order = plain_order(seen.gate_up, seen.down, i, int(owned[i]), seen.inputs)
            assert row == [int(new[i]) * ffn + m for m in order]


def test_order_by_chunks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(2, 20, 6, generator=generator)
    down = torch.randn(2, 6, 10, generator=generator)
    inputs = torch.randn(50, 6, generator=generator)
    expected = plain_order(gate_up, down, 0, 1, inputs)
    for tokens in (7, 50):
        monkeypatch.setattr(ream_alignment, "TOKENS", tokens)
        centroid = Centroid((gate_up[1], down[1]), inputs, torch.nn.functional.silu)
        assert centroid.order((gate_up[0], down[0])).tolist() == expected
    # Neurons that never fire are no NaN.
    down_still = Centroid((gate_up[1] * 0, down[1]), inputs, torch.nn.functional.silu)
    assert sorted(down_still.order((gate_up[0], down[0])).tolist()) == list(range(10))


def test_budgets(tiny_model: MakeModel, rows: Path) -> None:
    model = tiny_model("mixtral")
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {
        "method": "ream",
        "calibration": rows,
        "progress": lambda *step: seen.append(step),
    }
    plan = make_plan(model, experts=4, skip_layers=[1], top_k=1, **options)
    assert [(x.kept_experts, x.top_k) for x in plan.layers] == [(4, 1), (8, 2), (4, 1)]
    assert plan.layers[1].is_identity
    assert seen == [(i, 4) for i in range(1, 5)]
    seen.clear()
    plan = make_plan(model, experts="4,6,8", **options)
    assert [x.kept_experts for x in plan.layers] == [4, 6, 8]
    assert seen == [(i, 3) for i in range(1, 4)]
    plan = make_plan(model, experts=8, **options)
    assert all(x.is_identity for x in plan.layers)
    with pytest.raises(PlanError, match="method ream ranks the experts of one layer"):
        make_plan(model, experts=4, allocate="global", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size is 1, expected at least 2, or 0"),
        ({"group_size": -1}, "group_size is -1"),
        ({"align_tokens": 0}, "align_tokens is 0, expected at least 1"),
    ],
)
def test_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        METHODS["ream"].with_options(options)
