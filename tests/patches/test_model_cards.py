from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from liveprune.patches.hf_config import adapt_config
from liveprune.patches.model_cards import describe, wrap_show_models
from tests.patches.configs import FAMILIES, raw_config

Read = Callable[[dict[str, Any]], Any]
BLOCK = {"version": 1, "plan": "00ff", "base_model": "org/base"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model(family: str, read_config: Read) -> None:
    assert describe(read_config(raw_config(family))) == {
        "base_model": None,
        "plan": None,
        "experts": {"min": 8, "max": 8},
        "top_k": {"min": 2, "max": 2},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_as_the_engine_sees_it(family: str, read_config: Read) -> None:
    config = read_config(
        raw_config(
            family, num_experts_by_block=dict.fromkeys("0123", 5) | {"3": 1}, liveprune=BLOCK
        )
    )
    adapt_config(config)
    assert describe(config) == {
        "base_model": "org/base",
        "plan": "00ff",
        "experts": {"min": 1, "max": 5},
        "top_k": {"min": 1, "max": 2},
    }


def test_an_overridden_top_k_is_the_effective_one(read_config: Read) -> None:
    """``--hf-overrides '{"num_experts_per_tok": 1}'``."""
    config = read_config(raw_config("mixtral"))
    config.num_experts_per_tok = 1
    assert describe(config)["top_k"] == {"min": 1, "max": 1}  # type: ignore[index]


def test_other_families_have_nothing_to_say(read_config: Read) -> None:
    assert describe(read_config({"model_type": "llama"})) is None


@pytest.mark.parametrize(("parent", "expected"), [(None, "org/base"), ("stated", "stated")])
def test_cards_name_base_model_and_counts(
    parent: str | None, expected: str, read_config: Read
) -> None:
    card = SimpleNamespace(id="served", parent=parent)

    async def show(self: Any) -> Any:
        return SimpleNamespace(data=[card])

    config = read_config(raw_config("mixtral", liveprune=BLOCK))
    registry = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    asyncio.run(wrap_show_models(show)(registry))
    assert card.parent == expected
    assert card.liveprune == describe(config)


def test_cards_of_other_families_are_untouched(read_config: Read) -> None:
    card = SimpleNamespace(id="served", parent=None)

    async def show(self: Any) -> Any:
        return SimpleNamespace(data=[card])

    config = read_config({"model_type": "llama"})
    registry = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    asyncio.run(wrap_show_models(show)(registry))
    assert vars(card) == {"id": "served", "parent": None}


@pytest.fixture
def registry(read_config: Read) -> Any:
    """vLLM's own registry with two names for one base model."""
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry

    config = read_config(raw_config("mixtral"))
    model = SimpleNamespace(hf_config=config, max_model_len=64)
    paths = [BaseModelPath(name=name, model_path="org/base") for name in ("m", "also-m")]
    return OpenAIModelRegistry(model, paths)


def shown(registry: Any) -> list[dict[str, Any]]:
    show = type(registry).show_available_models
    show = getattr(show, "__wrapped__", show)  # a test before may have loaded the plugin
    models = asyncio.run(wrap_show_models(show)(registry))
    return [card.model_dump() for card in models.data]


def test_live_variants_follow_the_base_model(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two:
        def cards(self) -> list[dict[str, Any]]:
            tags = {"full": 2, "e4k1": 1}
            return [
                {"id": f"m:{tag}", "parent": "m", "liveprune": {"top_k": k}}
                for tag, k in tags.items()
            ]

    base = shown(registry)
    monkeypatch.setattr("liveprune.patches.admission._directory", Two())
    cards = shown(registry)
    assert [card["id"] for card in cards] == ["m", "also-m", "m:full", "m:e4k1"]
    assert [card["parent"] for card in cards] == [None, None, "m", "m"]
    assert cards[3]["liveprune"] == {"top_k": 1}
    assert [{**card, "permission": None, "created": 0} for card in cards[:2]] == [
        {**card, "permission": None, "created": 0} for card in base
    ]
    for card in cards[2:]:
        assert (card["root"], card["max_model_len"]) == ("org/base", 64)
        assert (card["object"], card["owned_by"]) == ("model", "vllm")
    permissions = {permission["id"] for card in cards for permission in card["permission"]}
    assert len(permissions) == len(cards)


def test_adapters_follow_the_variants(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry, OpenAIServingModels
    from vllm.lora.request import LoRARequest

    class One:
        def cards(self) -> list[dict[str, Any]]:
            return [{"id": "m:e4k1", "parent": "m", "liveprune": {}}]

    show = OpenAIModelRegistry.show_available_models
    show = getattr(show, "__wrapped__", show)
    monkeypatch.setattr(OpenAIModelRegistry, "show_available_models", wrap_show_models(show))
    monkeypatch.setattr("liveprune.patches.admission._directory", One())
    engine = SimpleNamespace(
        model_config=registry.model_config, renderer=None, input_processor=None
    )
    models = OpenAIServingModels(engine, registry.base_model_paths)
    models.lora_requests["adapter"] = LoRARequest("adapter", 1, "/adapters/1")
    cards = asyncio.run(models.show_available_models()).data
    assert [card.id for card in cards] == ["m", "also-m", "m:e4k1", "adapter"]
