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
