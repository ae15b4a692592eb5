from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from liveprune.pruning.calibration.streamed import StreamedModel
from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.errors import ArchitectureError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from tests.checkpoints import merge_plan
from tests.forms import form_plan

TinyModel = Callable[..., Path]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (lambda base: merge_plan(base, 4, router_map=True), "a router map"),
        (lambda base: form_plan(base, "merge+map"), "an expert map"),
        (lambda base: form_plan(base, "constants"), "constant experts"),
    ],
)
def test_gates_that_keep_the_base_models_rows_are_refused(
    plan: Callable[[Path], Plan], words: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model("mixtral")
    apply_plan(base, plan(base), tmp_path / "out")
    with pytest.raises(ArchitectureError, match=f"layer 0 has {words}; expected the base model"):
        StreamedModel(tmp_path / "out", ModelSpec.from_path(tmp_path / "out"))
