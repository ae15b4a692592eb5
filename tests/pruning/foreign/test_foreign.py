from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from liveprune.pruning.errors import PlanError
from liveprune.pruning.foreign import Form, form_of, read_any_plan
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_io import CHECKPOINT_PLAN, save_plan

CONFIG = {
    "model_type": "mixtral",
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
SPEC = ModelSpec.from_config(CONFIG)
PLAN = Plan("mixtral", 1, (LayerPlan(0, 4, 2, kept=(0, 2, 3)),), Lineage("reap"))
ROW = {"layer": 0, "experts": [3, 2, 0, 1]}


@pytest.fixture
def files(tmp_path: Path) -> dict[Form, Path]:
    """One file of each form; every plan among them keeps the experts 0, 2 and 3."""
    made = {form: tmp_path / f"{form.name}.txt" for form in Form}
    save_plan(PLAN, made[Form.OWN])
    torch.save(
        {"others": torch.eye(4)[[0, 3, 2]], "others_transfer": torch.eye(4)[[0, 3, 2]]},
        made[Form.EEP],
    )
    made[Form.REPORT].write_text(json.dumps({"model.layers.0.mlp": [0, 2, 3]}))
    made[Form.RANKED].write_text(json.dumps(ROW) + "\n")
    made[Form.COUNTS].write_text(json.dumps({"num_experts_by_block": [3]}))
    return made


@pytest.mark.parametrize("form", Form)
def test_forms_are_recognised_by_content(files: dict[Form, Path], form: Form) -> None:
    assert form_of(files[form]) is form


@pytest.mark.parametrize("form", [Form.OWN, Form.EEP, Form.REPORT, Form.RANKED])
def test_all_forms_give_the_same_plan(files: dict[Form, Path], form: Form) -> None:
    ratio = 0.25 if form is Form.RANKED else None
    plan = read_any_plan(files[form], SPEC, ratio=ratio)
    assert plan == PLAN
    assert plan.lineage.method == ("reap" if form is Form.OWN else form.value)


@pytest.mark.parametrize("form", [Form.EEP, Form.REPORT, Form.RANKED])
def test_foreign_forms_need_the_model(files: dict[Form, Path], form: Form) -> None:
    with pytest.raises(PlanError, match=f"found {form}, which does not state its model; pass"):
        read_any_plan(files[form])


def test_our_own_plans_do_not(files: dict[Form, Path]) -> None:
    assert read_any_plan(files[Form.OWN]) == PLAN


def test_a_plan_is_checked_against_the_model_that_is_given(files: dict[Form, Path]) -> None:
    other = ModelSpec.from_config({**CONFIG, "num_local_experts": 8})
    with pytest.raises(PlanError, match="layer 0: the plan is for 4 experts, the model has 8"):
        read_any_plan(files[Form.OWN], other)


def test_counts_are_no_plan(files: dict[Form, Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"not which; expected a plan.*--experts LIST"):
        read_any_plan(files[Form.COUNTS], SPEC)
    for content in (CONFIG, [3], {"0": 3}, {"per_layer_config": {}}):
        (tmp_path / "x").write_text(json.dumps(content))
        assert form_of(tmp_path / "x") is Form.COUNTS


@pytest.mark.parametrize("form", [Form.OWN, Form.EEP, Form.REPORT, Form.COUNTS])
def test_a_ratio_is_for_rankings(files: dict[Form, Path], form: Form) -> None:
    with pytest.raises(PlanError, match=r"ratio is 0\.5, but only ranked experts take one"):
        read_any_plan(files[form], SPEC, ratio=0.5)


def test_our_own_plans_state_their_top_k(files: dict[Form, Path]) -> None:
    with pytest.raises(PlanError, match="top_k is 1, but a liveprune-plan states its own top-k"):
        read_any_plan(files[Form.OWN], SPEC, top_k=1)


def test_a_folder_is_a_checkpoint_with_its_plan(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"found no liveprune/plan\.json; expected a pruned checkpoint"
    ):
        read_any_plan(tmp_path, SPEC)
    save_plan(PLAN, tmp_path / CHECKPOINT_PLAN)
    assert read_any_plan(tmp_path, SPEC) == PLAN


def test_an_unknown_version_of_our_own_form_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"format": "liveprune-plan", "version": 9}')
    with pytest.raises(PlanError, match="plan version is 9; this release reads 1"):
        read_any_plan(tmp_path / "x", SPEC)


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"{}", b"[]", b"3", b'"x"', b"text", b'{"a": 1}', b"[[0]]", b"{}\n{", b"\xff\xfe"],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PlanError, match=r"x: (in no known form, expected one of|not readable)"):
        read_any_plan(tmp_path / "x", SPEC)
    with pytest.raises(PlanError, match="absent: not readable as a plan"):
        read_any_plan(tmp_path / "absent", SPEC)
