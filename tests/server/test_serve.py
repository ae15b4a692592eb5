from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from liveprune.patches.live_config import LiveConfig
from liveprune.pruning.errors import CheckpointError, IncompatibleEnvironmentError, VariantError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.server import serve
from liveprune.server.live_options import LiveOptions


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
    found = serve.vllm_arguments("m", flags)
    assert found[:4] == ["m", *flags]
    assert found[4::2] == ["--middleware"] * len(serve.MIDDLEWARE)
    assert tuple(found[5::2]) == serve.MIDDLEWARE
    assert serve.MIDDLEWARE[-1].endswith("VariantMiddleware"), "the last is the outermost"


def test_the_live_config_joins_the_users_own_additional_config() -> None:
    config = LiveConfig("base", 17, 8, 100)
    found = serve.vllm_arguments("m", ["--additional-config", '{"mine": 1}', "--port", "1"], config)
    assert found.count("--additional-config") == 1
    carried = json.loads(found[found.index("--additional-config") + 1])
    assert carried == {"mine": 1, **config.to_additional_config()}
    assert found[:3] == ["m", "--port", "1"]
    assert found[found.index("--scheduling-policy") + 1] == "priority"
    with pytest.raises(VariantError, match=r"--additional-config: found \[1\], expected a JSON"):
        serve.vllm_arguments("m", ["--additional-config=[1]"], config)


@pytest.mark.parametrize(
    "flags",
    [["--scheduling-policy", "fcfs"], ["--scheduling-policy=fcfs"], ["--scheduling_policy=fcfs"]],
)
def test_the_users_own_scheduling_policy_stays(flags: list[str]) -> None:
    found = serve.vllm_arguments("m", flags, LiveConfig("base", 17, 8, 100))
    assert "priority" not in found
    assert found[1 : 1 + len(flags)] == flags
    assert "--scheduling-policy" not in serve.vllm_arguments("m", []), "only with live variants"


def test_doors_past_the_middleware_turn_live_variants_off(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(tiny_model("mixtral"))
    options = LiveOptions(state=tmp_path)
    assert serve.prepare_live(base, ["--grpc"], options) is None
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert serve.prepare_live(base, [], options) is None
    insisting = LiveOptions(state=tmp_path, resident="full")
    with pytest.raises(IncompatibleEnvironmentError, match="VLLM_USE_RUST_FRONTEND"):
        serve.prepare_live(base, [], insisting)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_plugin_that_is_switched_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "a,liveprune")
    serve.check_plugin_enabled()
    monkeypatch.setenv("VLLM_PLUGINS", "a")
    with pytest.raises(IncompatibleEnvironmentError, match="leaves out liveprune"):
        serve.check_plugin_enabled()
