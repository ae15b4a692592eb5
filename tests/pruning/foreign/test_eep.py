from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from liveprune.pruning.errors import PlanError
from liveprune.pruning.foreign import read_any_plan
from liveprune.pruning.foreign.eep import matches, read_coefficients
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan

PUBLISHED = (
    "arc-e_budget_6",
    "boolq_budget_4",
    "cb_budget_2",
    "drop_budget_2",
    "gsm8k_budget_6",
    "rte_budget_4",
    "squad_budget_4",
    "wic_budget_2",
)
Array = npt.NDArray[np.float64]


def mixtral(layers: int = 32, experts: int = 8) -> ModelSpec:
    """The sizes of Mixtral-8x7B, for which the published files are."""
    return ModelSpec.from_config(
        {
            "model_type": "mixtral",
            "num_hidden_layers": layers,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_local_experts": experts,
            "num_experts_per_tok": 2,
        }
    )


def qwen(layers: int = 2) -> ModelSpec:
    """A router that does not renormalise."""
    return ModelSpec.from_config(
        {
            "model_type": "qwen2_moe",
            "num_hidden_layers": layers,
            "hidden_size": 32,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        }
    )


def one_hot(*experts: int) -> torch.Tensor:
    return torch.eye(8)[list(experts)]


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def both(key: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    transfer = "others_transfer" if key == "others" else key.replace("layers", "transfer")
    return {key: matrix, transfer: matrix.clone()}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.3", "model.layers.3.block_sparse_moe.experts", True),
        ("layers.3", "model.layers.31.block_sparse_moe.experts", False),
        ("layers.3", "model.layers.13.block_sparse_moe.experts", False),
        ("layers.[0-7]", "model.layers.7.block_sparse_moe.experts", True),
        ("layers.[0-7]", "model.layers.8.block_sparse_moe.experts", False),
        ("layers.[8-15]", "model.layers.10.mlp.experts", True),
        ("layers.*", "model.layers.10.mlp.experts", True),
        ("*.layers.*.mlp", "model.layers.10.mlp.experts", True),
        ("layers.*.experts", "model.layers.10.mlp.experts", False),
        ("layer.3", "model.layers.3.mlp.experts", False),
        ("transfer.[0-7]", "transfer.4", True),
        ("transfer.4", "transfer.4", True),
        ("transfer.4", "transfer.40", False),
        ("transfer.4.x", "transfer.4", False),
        ("[0-9]", "transfer.4", True),
        ("[0-9]", "transfer.x", False),
    ],
)
def test_component_wise_matching(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
def test_ranges_are_inclusive(layer: int, low: int, high: int) -> None:
    name = f"model.layers.{layer}.block_sparse_moe.experts"
    assert matches(f"layers.[{low}-{high}]", name) == (low <= layer <= high)
    assert matches(f"layers.{low}", name) == (low == layer)


def test_one_hot_files_are_ordinary_prunings(tmp_path: Path) -> None:
    content = both("layers.0", one_hot(6, 1, 3)) | both("others", one_hot(0, 2, 4))
    plan = read_any_plan(write(tmp_path / "x.pth", content), mixtral(3))
    assert [x.kept for x in plan.layers] == [(1, 3, 6), (0, 2, 4), (0, 2, 4)]
    assert [x.top_k for x in plan.layers] == [2, 2, 2]
    assert not plan.merges
    assert plan.is_uniform
    assert (plan.architecture, plan.num_hidden_layers) == ("mixtral", 3)
    assert plan.lineage.method == "eep-coefficients"
    assert plan.lineage.parameters == {"source": "x.pth"}


def test_without_renormalisation_the_router_map_stays_literal(tmp_path: Path) -> None:
    """Dropping gate rows would inflate the weights (methods.md, section 1.2)."""
    path = write(tmp_path / "x.pth", both("others", one_hot(6, 1, 3)))
    plan = read_any_plan(path, qwen())
    for layer in plan.layers:
        assert layer.kept == ()
        assert layer.merge is not None
        assert layer.router_map is not None
        assert layer.merge.argmax(axis=1).tolist() == [6, 1, 3]
        assert np.array_equal(layer.router_map, layer.merge)


@pytest.mark.parametrize(
    ("merge", "router_map"),
    [
        (one_hot(1, 1, 3), one_hot(1, 1, 3)),  # an expert twice
        (one_hot(1, 2, 3), one_hot(2, 1, 3)),  # router rows of other experts
        (one_hot(1, 2, 3) * 0.5, one_hot(1, 2, 3)),  # scaled
        (one_hot(1, 2, 3), one_hot(1, 2, 3) * 2),
        (one_hot(1, 2, 3) + one_hot(4, 4, 4) * 0.01, one_hot(1, 2, 3)),
        (one_hot(1, 2, 3) + one_hot(4, 4, 4), one_hot(1, 2, 3) + one_hot(4, 4, 4)),
    ],
)
def test_what_is_no_pruning_keeps_its_matrices(
    tmp_path: Path, merge: torch.Tensor, router_map: torch.Tensor
) -> None:
    path = write(tmp_path / "x.pth", {"others": merge, "others_transfer": router_map})
    layer = read_any_plan(path, mixtral(1)).layers[0]
    assert layer.merge is not None
    assert layer.router_map is not None
    assert np.array_equal(layer.merge, merge.numpy())
    assert np.array_equal(layer.router_map, router_map.numpy())


def _route(weights: Array, top_k: int) -> dict[int, float]:
    chosen = np.argsort(-weights)[:top_k]
    return {int(j): float(weights[j] / weights[chosen].sum()) for j in chosen}


@given(
    logits=st.lists(st.integers(-40, 40), min_size=8, max_size=8, unique=True),
    rows=st.permutations(range(8)).flatmap(lambda p: st.integers(2, 8).map(lambda n: p[:n])),
)
def test_collapse_is_exact_for_renormalised_routers(logits: list[int], rows: list[int]) -> None:
    """EEP's formula (softmax, map, top-k, divide) picks the experts and weights of the slice."""
    scaled = np.array(logits) / 10
    probabilities = np.exp(scaled) / np.exp(scaled).sum()
    mapped = _route(np.eye(8)[rows] @ probabilities, 2)
    kept = sorted(rows)
    sliced = _route(np.exp(scaled[kept]) / np.exp(scaled[kept]).sum(), 2)
    by_expert = {rows[j]: w for j, w in mapped.items()}
    assert by_expert == pytest.approx({kept[j]: w for j, w in sliced.items()}, abs=1e-12)


def test_key_order_does_not_matter_but_first_match_wins(tmp_path: Path) -> None:
    content = both("layers.[0-1]", one_hot(0, 1)) | both("others", one_hot(2, 3))
    turned = dict(reversed(content.items()))
    first = read_any_plan(write(tmp_path / "a", content), mixtral(3))
    assert read_any_plan(write(tmp_path / "b", turned), mixtral(3)) == first
    shadowed = both("layers.[0-1]", one_hot(0, 1)) | both("layers.1", one_hot(6, 7))
    shadowed |= both("others", one_hot(2, 3))
    assert read_any_plan(write(tmp_path / "c", shadowed), mixtral(3)) == first


def test_others_is_not_needed_when_all_layers_are_named(tmp_path: Path) -> None:
    content = both("layers.0", one_hot(0, 1)) | both("layers.1", one_hot(2, 3, 4))
    plan = read_any_plan(write(tmp_path / "x.pth", content), mixtral(2))
    assert [x.kept for x in plan.layers] == [(0, 1), (2, 3, 4)]


def test_safetensors_with_the_same_keys(tmp_path: Path) -> None:
    save_file(both("others", one_hot(0, 5)), tmp_path / "x.json")
    assert read_any_plan(tmp_path / "x.json", mixtral(1)).layers[0].kept == (0, 5)


def test_a_file_of_a_running_search(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth", (both("others", one_hot(0, 5)), ("accuracy", 71.5)))
    plan = read_any_plan(path, mixtral(1), top_k=1)
    assert plan.layers[0].kept == (0, 5)
    assert plan.layers[0].top_k == 1
    assert plan.lineage.scores == {"accuracy": 71.5}
    assert plan.lineage.parameters == {"source": "x.pth", "top_k": 1}


def test_one_expert_left_is_one_active(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth", both("others", one_hot(5)))
    with pytest.raises(PlanError, match=r"layer 0: keeps 1 experts, .* model's top-k = 2; pass"):
        read_any_plan(path, mixtral(1))
    assert read_any_plan(path, mixtral(1), top_k=2).layers[0].top_k == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([None], "placeholder that an EEP search writes"),
        ((1, 2, 3), r"found a tuple, expected \(coefficients, \(metric, value\)\)"),
        ((both("others", one_hot(0)), ("accuracy", None)), "found a tuple, expected"),
        ({}, "found dict, expected a dict of matrices"),
        (torch.zeros(3), "found Tensor, expected a dict of matrices"),
        ({"others": one_hot(0)[0]}, r"'others' is \(8,\), expected matrices"),
        ({"others": [1.0]}, "'others' is list, expected matrices"),
        ({"weight": one_hot(0)}, "'weight' is .* expected matrices"),
        ({3: one_hot(0)}, "3 is .* expected matrices"),
        (both("others", one_hot(0) * float("nan")), "'others' holds NaN or infinity"),
        (
            {"others": one_hot(0), "others_transfer": one_hot(0) / 0},
            "'others_transfer' holds NaN or infinity",
        ),
        ({"layers.0": one_hot(0, 1), "others_transfer": one_hot(0, 1)}, "layer 1: found no coeff"),
        ({"others": one_hot(0)}, "layer 0: found no coefficients.*'transfer.0', or 'others_trans"),
        (both("others", torch.eye(6)[:2]), r"layer 0: 'others' is \(2, 6\), expected \[kept, 8\]"),
        (
            {"others": one_hot(0, 1), "others_transfer": one_hot(0)},
            r"layer 0: router_map is \(1, 8\), expected \(2, 8\) like merge",
        ),
        (both("others", torch.zeros(9, 8)), r"layer 0: merge is \(9, 8\), expected \[1..8, 8\]"),
        # Names that the released search script writes and its own loader ignores.
        (both("others", one_hot(0)) | {"layer.0": one_hot(1)}, "'layer.0' matches no layer"),
        (both("others", one_hot(0)) | both("layers.2", one_hot(1)), "'layers.2' matches no layer"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = write(tmp_path / "x.pth", content)
    with pytest.raises(PlanError, match=message) as caught:
        read_any_plan(path, mixtral(2))
    assert str(caught.value).startswith(f"{path}: ")


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_a_pickle_never_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.pth", {"others": Payload()})
    with pytest.raises(PlanError, match="not readable as EEP coefficients"):
        read_any_plan(path, mixtral(1))
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("data", [b"PK\x03\x04 broken", b"\x80\x02 broken", b"\x80"])
def test_damaged_archives_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(PlanError, match=r"x\.pth: not readable as EEP coefficients"):
        read_any_plan(tmp_path / "x.pth", mixtral(1))


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes((20).to_bytes(8, "little") + b"{broken")
    with pytest.raises(PlanError, match="not readable as safetensors"):
        read_any_plan(tmp_path / "x", mixtral(1))


# The files of the EEP authors and the outputs of their code.


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(shared: Path, name: str) -> None:
    path = shared / "golden" / "eep_published" / f"{name}.pth"
    budget = int(name[-1])
    plan = read_any_plan(path, mixtral())
    assert [x.layer for x in plan.layers] == list(range(32))
    assert {(x.kept_experts, x.experts, x.top_k) for x in plan.layers} == {(budget, 8, 2)}
    # Value ranges over all published files (methods.md, section 2.8).
    groups = read_coefficients(path).groups
    bounds = {False: ((-0.24, 1.21), (0.55, 1.60)), True: ((-0.26, 1.21), (0.63, 1.47))}
    for group in groups:
        (low, high), (least, most) = bounds[group.is_router_map]
        assert low - 0.005 <= group.matrix.min() <= group.matrix.max() <= high + 0.005
        sums = group.matrix.sum(axis=1)
        assert least - 0.005 <= sums.min() <= sums.max() <= most + 0.005
    grouped = name.split("_", maxsplit=1)[0] in ("boolq", "cb", "squad", "wic")
    assert len(groups) == (8 if grouped else 64)


def _share_pruned(plan: Plan) -> float:
    return sum(x.merge is None for x in plan.layers) / len(plan.layers)


def test_a_purely_one_hot_published_file_is_an_ordinary_checkpoint(shared: Path) -> None:
    folder = shared / "golden" / "eep_published"
    arc = read_any_plan(folder / "arc-e_budget_6.pth", mixtral())
    assert _share_pruned(arc) == 1
    assert arc.is_uniform
    drop = read_coefficients(folder / "drop_budget_2.pth").groups
    assert sum(group.one_hot is not None for group in drop) / len(drop) >= 0.72
    assert _share_pruned(read_any_plan(folder / "drop_budget_2.pth", mixtral())) == 0.5
    boolq = read_any_plan(folder / "boolq_budget_4.pth", mixtral())
    assert _share_pruned(boolq) == 0
    assert boolq.has_router_map


def test_groups_reach_their_layers(shared: Path) -> None:
    folder = shared / "golden" / "eep_published"
    raw = torch.load(folder / "cb_budget_2.pth", weights_only=True)
    plan = read_any_plan(folder / "cb_budget_2.pth", mixtral())
    for layer, span in ((0, "[0-7]"), (7, "[0-7]"), (8, "[8-15]"), (23, "[16-23]")):
        matrices = plan.layer(layer).matrices()
        assert np.array_equal(matrices[f"layers.{layer}.merge"], raw[f"layers.{span}"])
        assert np.array_equal(matrices[f"layers.{layer}.router_map"], raw[f"transfer.{span}"])
    assert np.array_equal(plan.layer(31).matrices()["layers.31.merge"], raw["others"])
    raw = torch.load(folder / "rte_budget_4.pth", weights_only=True)
    plan = read_any_plan(folder / "rte_budget_4.pth", mixtral())
    for layer in range(31):
        base = plan.layer(layer)
        if base.merge is not None:
            assert np.array_equal(base.merge, raw[f"layers.{layer}"])
    last = plan.layer(31).matrices()
    assert np.array_equal(last["layers.31.router_map"], raw["others_transfer"])


def test_statistics_of_published_files(shared: Path) -> None:
    stats = json.loads((shared / "golden" / "eep" / "searched_coeff_stats.json").read_text())
    for name, stated in stats.items():
        file = read_coefficients(shared / "golden" / "eep_published" / f"{name}.pth")
        assert sorted(g.key for g in file.groups) == sorted(stated["keys"])
        for group in file.groups:
            expected = stated["groups"][group.key]
            assert list(group.matrix.shape) == expected["shape"]
            assert group.matrix.min() == pytest.approx(expected["min"])
            assert group.matrix.max() == pytest.approx(expected["max"])
            assert group.matrix.argmax(axis=1).tolist() == expected["row_argmax"]
            sums = group.matrix.sum(axis=1)
            assert sums == pytest.approx(expected["row_sums"], abs=6e-5)


@pytest.mark.parametrize("kind", ["onehot", "onehot_unsorted", "continuous", "continuous_nonneg"])
def test_coefficients_of_the_reference_runs(shared: Path, kind: str) -> None:
    golden = shared / "golden"
    model = ModelSpec.from_path(golden / "ckpt" / "mixtral_rand")
    path = golden / "eep" / f"mixtral_rand.b4.{kind}.coeff.safetensors"
    plan = read_any_plan(path, model)
    assert plan.merges == kind.startswith("continuous")
    assert [x.kept_experts for x in plan.layers] == [4, 4, 4]
