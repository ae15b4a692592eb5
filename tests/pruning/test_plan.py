from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.errors import PlanError
from liveprune.pruning.plan import LayerPlan, Lineage, Plan

LINEAGE = Lineage("test")
HALF = np.eye(8, dtype=np.float32)[:4]


def plan(*layers: LayerPlan, depth: int = 3, lineage: Lineage = LINEAGE, **fields: Any) -> Plan:
    return Plan("mixtral", depth, layers, lineage, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kept": (0, 8)}, r"layer 5: found kept ids \[8\], expected 0 to 7"),
        ({"kept": (-1, 0)}, r"layer 5: found kept ids \[-1\], expected 0 to 7"),
        ({"kept": (3, 1)}, r"layer 5: found kept ids \[3, 1\], expected ascending"),
        ({"kept": (1, 1)}, r"layer 5: found kept ids \[1, 1\], expected ascending without"),
        ({"kept": ()}, r"layer 5: found no kept experts, expected at least 1"),
        ({"kept": (0, 1.5)}, r"layer 5: kept id is 1\.5, expected a whole number"),
        ({"kept": (0, True)}, r"layer 5: kept id is True, expected a whole number"),
        ({"kept": ("0",)}, r"layer 5: kept id is '0', expected a whole number"),
        ({"kept": (0, 1), "top_k": 3}, r"layer 5: top_k is 3, expected 1 to 2"),
        ({"kept": (0, 1), "top_k": 0}, r"layer 5: top_k is 0, expected 1 to 2"),
        ({"kept": (0, 1), "top_k": 1.0}, r"layer 5: top_k is 1\.0, expected a whole number"),
        ({"router_map": HALF}, r"layer 5: found a router_map without a merge matrix"),
        (
            {"merge": HALF, "router_map": HALF, "kept": (0, 1, 2, 3)},
            r"layer 5: found both a router_map and kept ids",
        ),
        (
            {"merge": HALF, "router_map": HALF[:3]},
            r"layer 5: router_map is \(3, 8\), expected \(4, 8\) like merge",
        ),
        ({"merge": HALF}, r"layer 5: found no kept experts"),
        ({"merge": HALF, "kept": (0, 1)}, r"layer 5: found 2 kept ids for 4 merged experts"),
        (
            {"merge": np.ones((4, 7)), "router_map": np.ones((4, 7))},
            r"layer 5: merge is \(4, 7\), expected \[1\.\.8, 8\]",
        ),
        ({"merge": np.ones((9, 8))}, r"layer 5: merge is \(9, 8\), expected \[1\.\.8, 8\]"),
        ({"merge": np.ones((0, 8))}, r"layer 5: merge is \(0, 8\), expected \[1\.\.8, 8\]"),
        ({"merge": np.ones(8)}, r"layer 5: merge is \(8,\), expected \[1\.\.8, 8\]"),
        ({"merge": np.full((4, 8), np.nan)}, r"layer 5: merge holds NaN or infinity"),
        ({"merge": np.full((4, 8), 1e300)}, r"layer 5: merge holds NaN or infinity"),
        (
            {"merge": HALF, "router_map": np.full((4, 8), np.inf)},
            r"layer 5: router_map holds NaN or infinity",
        ),
        ({"merge": [["a"] * 8]}, r"layer 5: merge is not a matrix of numbers"),
        ({"merge": [[1.0], [1.0, 2.0]]}, r"layer 5: merge is not a matrix of numbers"),
    ],
)
def test_malformed_layers_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        LayerPlan(**{"layer": 5, "experts": 8, "top_k": 1, **fields})


def test_the_three_forms_of_a_layer() -> None:
    pruned = LayerPlan(0, 8, 2, kept=(1, 5, 6))
    assert (pruned.kept_experts, pruned.router_width, pruned.is_identity) == (3, 3, False)
    mapped = LayerPlan(0, 8, 2, merge=HALF, router_map=HALF)
    assert (mapped.kept_experts, mapped.router_width, mapped.is_identity) == (4, 8, False)
    merged = LayerPlan(0, 8, 2, merge=HALF, kept=(0, 2, 4, 6))
    assert (merged.kept_experts, merged.router_width, merged.is_identity) == (4, 4, False)
    whole = LayerPlan(0, 8, 2, kept=tuple(range(8)))
    assert (whole.kept_experts, whole.router_width, whole.is_identity) == (8, 8, True)


def test_matrices_are_frozen_float32_copies() -> None:
    given_matrix = np.eye(8)[:4]
    layer = LayerPlan(2, 8, 2, merge=given_matrix, router_map=torch.eye(8)[:4])
    assert layer.merge is not None
    assert layer.router_map is not None
    given_matrix[0, 0] = 7
    assert layer.merge[0, 0] == 1
    assert layer.merge.dtype == layer.router_map.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        layer.merge[0, 0] = 2
    assert list(layer.matrices()) == ["layers.2.merge", "layers.2.router_map"]


def test_numpy_integers_become_plain_ones() -> None:
    layer = LayerPlan(np.int64(1), np.int32(8), np.int16(2), kept=tuple(np.array([0, 3])))
    assert plan(layer).digest == plan(LayerPlan(1, 8, 2, kept=(0, 3))).digest
    assert all(type(x) is int for x in (layer.layer, layer.experts, layer.top_k, *layer.kept))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "plan: found no layers"),
        ((1, 0), r"plan: found layers \[1, 0\], expected ascending"),
        ((1, 1), r"plan: found layers \[1, 1\], expected ascending without repeats"),
        ((0, 3), r"plan: found layers 0 to 3, expected 0 to 2"),
        ((-1,), r"plan: found layers -1 to -1, expected 0 to 2"),
    ],
)
def test_malformed_plans_are_refused(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(*(LayerPlan(i, 8, 2, kept=(0, 1)) for i in layers))


def test_plans_are_immutable() -> None:
    made = plan(LayerPlan(0, 8, 2, kept=(0, 1)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.architecture = "olmoe"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.layers[0].top_k = 1  # type: ignore[misc]


def test_lookup_by_layer_index() -> None:
    made = plan(LayerPlan(0, 8, 2, kept=(0, 1)), LayerPlan(2, 8, 2, kept=(4, 5)))
    assert made.layer(2).kept == (4, 5)
    with pytest.raises(KeyError):
        made.layer(1)


@pytest.mark.parametrize(
    ("layers", "uniform"),
    [
        ((LayerPlan(0, 8, 2, kept=(0, 1)), LayerPlan(1, 8, 2, kept=(6, 7))), True),
        ((LayerPlan(0, 8, 2, kept=(0, 1)), LayerPlan(1, 8, 2, kept=(5, 6, 7))), False),
        ((LayerPlan(0, 8, 2, kept=(0, 1)), LayerPlan(1, 8, 1, kept=(6, 7))), False),
        ((LayerPlan(0, 8, 2, merge=HALF, kept=(0, 1, 2, 3)),), True),
        ((LayerPlan(0, 8, 2, merge=HALF, router_map=HALF),), False),
        ((LayerPlan(0, 8, 2, merge=np.eye(8), router_map=np.eye(8)),), False),
    ],
)
def test_uniform_means_an_ordinary_checkpoint(layers: tuple[LayerPlan, ...], uniform: bool) -> None:
    assert plan(*layers).is_uniform is uniform


def test_merges_and_router_maps_are_reported() -> None:
    pruned, merged = (
        LayerPlan(0, 8, 2, kept=(0, 1)),
        LayerPlan(1, 8, 2, merge=HALF, kept=(0, 1, 2, 3)),
    )
    mapped = LayerPlan(2, 8, 2, merge=HALF, router_map=HALF)
    assert (plan(pruned).merges, plan(pruned).has_router_map) == (False, False)
    assert (plan(pruned, merged).merges, plan(pruned, merged).has_router_map) == (True, False)
    assert (plan(mapped).merges, plan(mapped).has_router_map) == (True, True)


def test_digest_ignores_how_the_plan_was_found() -> None:
    layer = LayerPlan(0, 8, 2, kept=(0, 1))
    found = Lineage("reap", {"seed": 1}, 7, "abc", {"torch": "2"}, {"0": [1.0]})
    assert plan(layer) == plan(layer, lineage=found, base_model="somewhere")
    assert hash(plan(layer)) == hash(plan(layer, lineage=found))
    assert len(plan(layer).digest) == 32


def test_digest_is_pinned() -> None:
    """Digests name variants and prove checkpoints: a change of definition is a new version."""
    layers = (
        LayerPlan(0, 8, 2, kept=(0, 3)),
        LayerPlan(1, 8, 1, merge=HALF, router_map=HALF * 0.5),
    )
    assert plan(*layers).digest == "f67e05fb88b375d97b5f7963c694637b"


@pytest.mark.parametrize(
    "other",
    [
        plan(LayerPlan(0, 8, 2, kept=(0, 2))),
        plan(LayerPlan(0, 8, 2, kept=(0, 1, 2))),
        plan(LayerPlan(0, 8, 1, kept=(0, 1))),
        plan(LayerPlan(0, 9, 2, kept=(0, 1))),
        plan(LayerPlan(1, 8, 2, kept=(0, 1))),
        plan(LayerPlan(0, 8, 2, kept=(0, 1)), depth=4),
        plan(LayerPlan(0, 8, 2, kept=(0, 1)), LayerPlan(1, 8, 2, kept=(0, 1))),
        plan(LayerPlan(0, 8, 2, merge=HALF[:2], kept=(0, 1))),
        plan(LayerPlan(0, 8, 2, merge=HALF[:2], router_map=HALF[:2])),
        Plan("olmoe", 3, (LayerPlan(0, 8, 2, kept=(0, 1)),), LINEAGE),
    ],
)
def test_digest_changes_with_content(other: Plan) -> None:
    assert other != plan(LayerPlan(0, 8, 2, kept=(0, 1)))


@given(row=st.integers(0, 3), column=st.integers(0, 7), mapped=st.booleans())
def test_digest_covers_every_matrix_entry(row: int, column: int, mapped: bool) -> None:
    changed = HALF.copy()
    changed[row, column] += np.float32(0.25)
    before = plan(LayerPlan(0, 8, 2, merge=HALF, router_map=HALF))
    pair = {"merge": HALF, "router_map": HALF} | {"router_map" if mapped else "merge": changed}
    assert plan(LayerPlan(0, 8, 2, **pair)) != before  # type: ignore[arg-type]


@given(st.sets(st.integers(0, 15), min_size=1), st.sets(st.integers(0, 15), min_size=1))
def test_digest_separates_kept_sets(one: set[int], two: set[int]) -> None:
    first, second = (plan(LayerPlan(0, 16, 1, kept=tuple(sorted(s)))) for s in (one, two))
    assert (first == second) == (one == two)


def test_forms_that_keep_the_gates_rows() -> None:
    merge = np.eye(4, dtype=np.float32)[:2] / 2
    tied = LayerPlan(layer=0, experts=4, top_k=3, merge=merge, expert_map=(0, 1, 1, 0))
    assert (tied.kept_experts, tied.router_width, tied.candidates) == (2, 4, 4)
    assert tied.merges
    assert tied.keeps_gate_rows
    novice = LayerPlan(layer=0, experts=3, top_k=2, kept=(1,), constants=np.ones((2, 5)))
    assert (novice.kept_experts, novice.router_width, novice.pruned) == (1, 3, (0, 2))
    assert not novice.merges
    assert not novice.is_identity
    neurons = np.array([[0, 1, 2], [-1, 3, 3], [4, 5, -1]])
    gathered = LayerPlan(
        layer=0, experts=3, top_k=1, kept=(0, 2), neuron_map=neurons, neuron_shares=[1, 2, 3]
    )
    assert gathered.kept_experts == gathered.router_width == 2
    assert gathered.merges
    digests = {
        Plan("mixtral", 1, (layer,), Lineage("hand")).digest for layer in (tied, novice, gathered)
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_map": (0, 0, 0)}, r"found an expert_map without merge or neuron_map"),
        ({"merge": np.eye(3)[:2], "expert_map": (0, 1)}, r"expert_map names \[0, 1\] for 2 expe"),
        ({"merge": np.eye(3)[:2], "expert_map": (0, 0, 0)}, r"each of 0 to 1 for 3 experts"),
        ({"merge": np.eye(3)[:2], "expert_map": (0, 1, 2)}, r"each of 0 to 1 for 3 experts"),
        ({"merge": np.eye(3)[:1], "kept": (0,), "expert_map": (0, 0, 0)}, r"found both an expert"),
        ({"kept": (0,), "constants": np.ones((1, 4))}, r"constants is \(1, 4\), expected \[2, an"),
        ({"kept": (0, 1, 2), "constants": np.ones((0, 4))}, r"some of the 3 ids kept"),
        ({"kept": (0,), "constants": np.full((2, 4), np.nan)}, r"constants holds NaN"),
        ({"kept": (0,), "neuron_map": np.zeros((3, 1), int)}, r"expected neuron_map and neuron_sh"),
        (
            {"kept": (0,), "neuron_map": [[0], [1], [-1]], "neuron_shares": [1, 1, 1]},
            r"neuron_map reaches -1 to 1, expected -1 to 0",
        ),
        (
            {"kept": (0,), "neuron_map": [[0, 0]] * 3, "neuron_shares": [1, 1, 1]},
            r"nothing goes to new neuron 1",
        ),
        (
            {"kept": (0,), "neuron_map": [[0]] * 3, "neuron_shares": [1, -1, 1]},
            r"neuron_shares hold -1",
        ),
        (
            {
                "kept": (0,),
                "merge": np.eye(3)[:1],
                "neuron_map": [[0]] * 3,
                "neuron_shares": [1] * 3,
            },
            r"found both merge and neuron_map",
        ),
    ],
)
def test_malformed_forms_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        LayerPlan(layer=0, experts=3, top_k=1, **fields)
