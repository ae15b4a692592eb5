from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from liveprune.patches.live_config import CONFIG_KEY, LiveConfig, live_config
from liveprune.patches.live_support import unsupported, wrap_create_engine_config
from liveprune.pruning.errors import IncompatibleEnvironmentError


def engine_config(*, required: bool = False, **changes: Any) -> Any:
    """The fields of vLLM's config that matter here; ``changes``: ``part__field=value``."""
    live = LiveConfig("model", 16, 8, 0, required=required)
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(model_type="mixtral"),
            quantization=None,
            enable_sleep_mode=False,
            runner_type="generate",
        ),
        parallel_config=SimpleNamespace(
            enable_expert_parallel=False,
            enable_eplb=False,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            ubatch_size=0,
            _api_process_count=1,
        ),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        load_config=SimpleNamespace(load_format="auto"),
        kernel_config=SimpleNamespace(moe_backend="auto"),
        additional_config=live.to_additional_config(),
    )
    for path, value in changes.items():
        part, _, field = path.partition("__")
        if field:
            setattr(getattr(config, part), field, value)
        else:
            setattr(config, part, value)
    return config


REFUSED = [
    ({"model_config__hf_text_config": SimpleNamespace(model_type="llama")}, "'llama'"),
    ({"model_config__quantization": "fp8"}, r"quantised weights \(fp8\)"),
    ({"speculative_config": object()}, "--speculative-config"),
    ({"lora_config": object()}, "--enable-lora"),
    ({"parallel_config__enable_expert_parallel": True}, "--enable-expert-parallel"),
    ({"parallel_config__enable_eplb": True}, "--enable-eplb"),
    ({"parallel_config__pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
    ({"parallel_config__data_parallel_size": 2}, "--data-parallel-size"),
    ({"parallel_config__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
    ({"parallel_config__enable_dbo": True}, "--enable-dbo"),
    ({"parallel_config__ubatch_size": 2}, "--ubatch-size"),
    ({"parallel_config___api_process_count": 2}, "--api-server-count"),
    ({"load_config__load_format": "dummy"}, "--load-format dummy"),
    ({"kv_transfer_config": object()}, "--kv-transfer-config"),
    ({"model_config__enable_sleep_mode": True}, "--enable-sleep-mode"),
    ({"model_config__runner_type": "pooling"}, "--runner pooling"),
]


def created(config: Any) -> Any:
    return wrap_create_engine_config(lambda self: config)(None)


def test_a_plain_engine_is_supported() -> None:
    config = engine_config()
    assert unsupported(config) is None
    assert live_config(created(config)) == LiveConfig("model", 16, 8, 0)


@pytest.mark.parametrize(("changes", "name"), REFUSED)
def test_what_cannot_work_is_refused_by_name_where_variants_were_asked_for(
    changes: dict[str, Any], name: str
) -> None:
    with pytest.raises(IncompatibleEnvironmentError, match=name):
        created(engine_config(required=True, **changes))


@pytest.mark.parametrize(("changes", "name"), REFUSED)
def test_and_turns_live_variants_off_otherwise(
    changes: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="liveprune"):
        assert live_config(created(engine_config(**changes))) is None
    assert "live variants are off" in caplog.text


def test_without_a_live_config_nothing_is_looked_at() -> None:
    config = SimpleNamespace(additional_config={"other": 1})
    assert created(config) is config


def test_the_config_survives_vllms_json() -> None:
    import json

    config = LiveConfig("model", 4, 0, 7, resident_slot=1, resident_plan="plan.json")
    carried = json.loads(json.dumps(config.to_additional_config()))
    assert live_config(SimpleNamespace(additional_config=carried)) == config
    assert set(carried) == {CONFIG_KEY}
