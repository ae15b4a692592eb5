from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from liveprune.pruning.errors import CheckpointError, IncompatibleEnvironmentError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.server import serve


def test_a_model_is_summed_up_in_one_line(tiny_model: Callable[..., Path]) -> None:
    line = serve.summary(ModelSpec.from_path(tiny_model("mixtral")))
    assert line == "mixtral, 3 layers with 8 experts, top-2"
    config = json.loads((tiny_model("mixtral") / "config.json").read_text())
    config["per_layer_config"] = {"1": {"num_local_experts": 5, "num_experts_per_tok": 1}}
    config["liveprune"] = {"version": 1, "plan": "abc"}
    line = serve.summary(ModelSpec.from_config(config))
    assert line == "mixtral, 3 layers with 5 to 8 experts, top-1 to 2, plan abc"


def test_a_damaged_checkpoint_is_refused_before_vllm_starts(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("mixtral"), model)
    config = json.loads((model / "config.json").read_text())
    broken = {**config, "num_local_experts": 9}
    (model / "config.json").write_text(json.dumps(broken))
    assert "9 experts" in serve.check_model(str(model))  # no pruned one: vLLM judges it
    for mark in (
        {"liveprune": {"version": 1}},
        {"per_layer_config": {"1": {"num_local_experts": 8}}},
    ):
        (model / "config.json").write_text(json.dumps({**broken, **mark}))
        with pytest.raises(CheckpointError, match=r"\[8, 64\], expected \[9, 64\]"):
            serve.check_model(str(model))


def test_a_family_that_only_vllm_knows_is_served_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "served by vLLM as it is" in serve.check_model(str(tmp_path))
    assert "vLLM resolves it" in serve.check_model("org/name")


def test_what_can_only_be_a_path_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    for name in (str(tmp_path / "missing"), "./missing", str(tmp_path / "plan.json")):
        with pytest.raises(CheckpointError, match="no such folder; expected a checkpoint folder"):
            serve.check_model(name)


def test_flags_pass_through_and_the_middleware_comes_on_top() -> None:
    flags = ["--port", "1", "--unknown-to-us"]
    assert serve.vllm_arguments("m", flags) == ["m", *flags, "--middleware", serve.MIDDLEWARE]


def test_a_plugin_that_is_switched_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "a,liveprune")
    serve.check_plugin_enabled()
    monkeypatch.setenv("VLLM_PLUGINS", "a")
    with pytest.raises(IncompatibleEnvironmentError, match="leaves out liveprune"):
        serve.check_plugin_enabled()
