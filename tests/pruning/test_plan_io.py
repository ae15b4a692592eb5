from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save_file

from liveprune.pruning.errors import PlanError
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_io import CHECKPOINT_PLAN, load_plan, plan_to_json, save_plan

HALF = np.eye(8, dtype=np.float32)[:4]
PRUNED = Plan(
    "mixtral",
    3,
    (LayerPlan(0, 8, 2, kept=(0, 3)), LayerPlan(2, 8, 1, kept=(1, 2, 7))),
    Lineage("reap", {"ratio": 0.5}, 11, "c0ffee", {"torch": "2.13"}, {"0": [0.1, 0.2]}),
    "somewhere/model",
)
MERGED = Plan(
    "mixtral",
    3,
    (
        LayerPlan(0, 8, 2, kept=(0, 3)),
        LayerPlan(1, 8, 2, merge=HALF, kept=(0, 1, 2, 3)),
        LayerPlan(2, 8, 1, merge=HALF, router_map=HALF * 0.5),
    ),
    Lineage("eep"),
)
FLOATS = st.floats(-2, 2, width=32)


@st.composite
def layer_plans(draw: st.DrawFn, index: int) -> LayerPlan:
    experts = draw(st.integers(1, 9))
    forms = ["pruned", "merged", "mapped", "tied", "gathered"]
    form = draw(st.sampled_from([*forms, *(["constant"] if experts > 1 else [])]))
    kept = tuple(sorted(draw(st.sets(st.integers(0, experts - 1), min_size=1))))
    top_k = draw(st.integers(1, len(kept)))
    matrix = arrays(np.float32, (len(kept), experts), elements=FLOATS)
    if form == "pruned":
        return LayerPlan(index, experts, top_k, kept=kept)
    if form == "merged":
        return LayerPlan(index, experts, top_k, kept=kept, merge=draw(matrix))
    if form == "tied":
        some = [*range(len(kept)), *draw(st.lists(st.sampled_from(range(len(kept))), max_size=9))]
        expert_map = (some + [0] * experts)[:experts]
        return LayerPlan(index, experts, top_k, merge=draw(matrix), expert_map=tuple(expert_map))
    if form == "constant":
        kept = kept[: experts - 1]
        vectors = draw(arrays(np.float32, (experts - len(kept), 3), elements=FLOATS))
        return LayerPlan(index, experts, experts, kept=kept, constants=vectors)
    if form == "gathered":
        targets = np.full((experts, 2), -1)
        targets[list(kept)] = np.arange(2 * len(kept)).reshape(-1, 2)
        shares = draw(arrays(np.float32, experts, elements=st.floats(0.5, 2, width=32)))
        return LayerPlan(index, experts, top_k, kept=kept, neuron_map=targets, neuron_shares=shares)
    return LayerPlan(index, experts, top_k, merge=draw(matrix), router_map=draw(matrix))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    indices = sorted(draw(st.sets(st.integers(0, 6), min_size=1, max_size=4)))
    lineage = Lineage(
        draw(st.text()),
        draw(st.dictionaries(st.text(), st.integers())),
        draw(st.none() | st.integers(0)),
        draw(st.none() | st.text()),
    )
    layers = tuple(draw(layer_plans(index)) for index in indices)
    return Plan(draw(st.text()), 7, layers, lineage, draw(st.text()))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plan=plans())
def test_round_trip(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(plan, path)
    loaded = load_plan(path)
    assert loaded == plan
    assert (loaded.lineage, loaded.base_model) == (plan.lineage, plan.base_model)
    for ours, theirs in zip(loaded.layers, plan.layers, strict=True):
        assert ours.kept == theirs.kept
        assert ours.matrices().keys() == theirs.matrices().keys()
        for name, matrix in ours.matrices().items():
            assert np.array_equal(matrix, theirs.matrices()[name])
            assert not matrix.flags.writeable


def test_files_of_a_plan(tmp_path: Path) -> None:
    save_plan(PRUNED, tmp_path / "pruned.json")
    save_plan(MERGED, tmp_path / "merged.v2.json")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["merged.v2.json", "merged.v2.safetensors", "pruned.json"]
    form = json.loads((tmp_path / "pruned.json").read_text())
    assert form == plan_to_json(PRUNED)
    assert form["layers"][1] == {"layer": 2, "experts": 8, "top_k": 1, "kept": [1, 2, 7]}
    assert "matrices" not in form
    assert set(load_file(tmp_path / "merged.v2.safetensors")) == {
        "layers.1.merge",
        "layers.2.merge",
        "layers.2.router_map",
    }


def test_a_folder_means_the_plan_of_a_checkpoint(tmp_path: Path) -> None:
    save_plan(MERGED, tmp_path / CHECKPOINT_PLAN)
    assert load_plan(tmp_path) == MERGED


def _tamper(path: Path, **changes: Any) -> None:
    form = json.loads(path.read_text())
    path.write_text(json.dumps(form | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "plan version is 2; this release reads 1"),
        ({"version": None}, "plan version is None; this release reads 1"),
        ({"format": "other"}, "expected a JSON object with format 'liveprune-plan'"),
        ({"architecture": "olmoe"}, "content has digest .*, expected .* as stated"),
        ({"num_hidden_layers": 4}, "content has digest"),
        ({"digest": "0" * 32}, "content has digest"),
        ({"digest": None}, "content has digest"),
        ({"num_hidden_layers": 2}, "plan: found layers 0 to 2, expected 0 to 1"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3', expected a whole number"),
        ({"layers": []}, "plan: found no layers"),
        ({"layers": None}, "malformed plan: TypeError"),
        ({"layers": [[0, 8, 2]]}, "malformed plan"),
        ({"layers": [{"layer": 0}]}, "malformed plan: KeyError: 'experts'"),
        (
            {"layers": [{"layer": 0, "experts": 8, "top_k": 1, "kept": [0, 8]}]},
            r"layer 0: found kept ids \[8\], expected 0 to 7",
        ),
        (
            {"layers": [{"layer": 0, "experts": 8, "top_k": 1, "kept": [0.5]}]},
            r"layer 0: kept id is 0\.5, expected a whole number",
        ),
        (
            {"layers": [{"layer": 0, "experts": 8, "top_k": 1, "merge": "layers.0.merge"}]},
            "layer 0: matrix 'layers.0.merge' is missing",
        ),
        ({"lineage": {"method": "x", "mood": "y"}}, "malformed plan: TypeError: .*mood"),
        ({"lineage": None}, "malformed plan: TypeError"),
    ],
)
def test_tampered_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "plan.json"
    save_plan(PRUNED, path)
    _tamper(path, **changes)
    with pytest.raises(PlanError, match=message) as caught:
        load_plan(path)
    assert str(path) in str(caught.value)


def test_lineage_may_change_without_breaking_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(PRUNED, path)
    _tamper(path, lineage={"method": "by hand"}, base_model="elsewhere")
    assert load_plan(path) == PRUNED


def test_other_matrices_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(MERGED, path)
    matrices = load_file(path.with_suffix(".safetensors"))
    matrices["layers.2.router_map"][0, 0] += 1
    save_file(matrices, path.with_suffix(".safetensors"))
    with pytest.raises(PlanError, match="content has digest"):
        load_plan(path)
    del matrices["layers.2.router_map"]
    save_file(matrices, path.with_suffix(".safetensors"))
    with pytest.raises(PlanError, match=r"layer 2: matrix 'layers.2.router_map' is missing"):
        load_plan(path)
    path.with_suffix(".safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(PlanError, match="not readable as safetensors"):
        load_plan(path)
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(PlanError, match="not readable as safetensors"):
        load_plan(path)


@pytest.mark.parametrize("name", ["../plan.safetensors", "/etc/hosts", "..", 3])
def test_matrices_lie_beside_the_plan(tmp_path: Path, name: object) -> None:
    path = tmp_path / "plan.json"
    save_plan(MERGED, path)
    _tamper(path, matrices=name)
    with pytest.raises(PlanError, match=r"plan\.json|safetensors"):
        load_plan(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe\x00", b'{"format": 1}'])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json: (not readable as a plan|expected a JSON)"):
        load_plan(path)
    with pytest.raises(PlanError, match=r"absent\.json: not readable"):
        load_plan(tmp_path / "absent.json")


def test_a_lineage_that_is_no_json_writes_nothing(tmp_path: Path) -> None:
    plan = Plan("mixtral", 3, MERGED.layers, Lineage("x", {"bad": object()}))
    with pytest.raises(TypeError):
        save_plan(plan, tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "plan-format.md").read_text()
    path = tmp_path / "plan.json"
    path.write_text(text.partition("```json\n")[2].partition("```")[0])
    assert [(x.kept, x.top_k) for x in load_plan(path).layers] == [((0, 2, 3, 7), 2), ((1, 4), 1)]


def test_a_folder_without_a_plan_is_no_pruned_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="expected a pruned checkpoint"):
        load_plan(tmp_path)
