from __future__ import annotations

import inspect
from importlib.metadata import entry_points
from typing import Any

import pytest

from liveprune.patches import plugin
from liveprune.patches.compat import check_seam
from liveprune.patches.layers import MAKE_LAYERS
from liveprune.pruning.errors import IncompatibleEnvironmentError
from tests.patches.conftest import Places


def now(places: Places) -> Places:
    return {(owner, name): getattr(owner, name) for owner, name in places}


def test_vllm_finds_the_plugin() -> None:
    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "liveprune"]
    assert [e.load() for e in found] == [plugin.register]


def test_register_replaces_every_function_wherever_it_is_bound(places: Places) -> None:
    plugin.register()
    for (owner, name), original in places.items():
        replacement = getattr(owner, name)
        assert replacement is not original
        assert inspect.unwrap(replacement) == inspect.unwrap(original)


def test_a_second_register_changes_nothing(places: Places) -> None:
    plugin.register()
    once = now(places)
    plugin.register()
    assert now(places) == once


def test_seams_still_match_once_patched(places: Places) -> None:
    plugin.register()
    for patch in plugin.PATCHES:
        check_seam(patch.seam)


def test_a_module_with_a_function_of_its_own_keeps_it(places: Places) -> None:
    import vllm.model_executor.models.mixtral as mixtral

    def own() -> None: ...

    mixtral.make_layers = own
    plugin.register()
    assert mixtral.make_layers is own


def test_unknown_vllm_is_refused_and_left_alone(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    with pytest.raises(IncompatibleEnvironmentError, match=r"vLLM 0\.33\.0 is installed"):
        plugin.register()
    assert now(places) == places


def test_one_drifted_function_leaves_all_alone(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_layers(num_hidden_layers: Any, layer_fn: Any) -> None: ...

    monkeypatch.setattr("vllm.model_executor.models.utils.make_layers", make_layers)
    before = now(places)
    with pytest.raises(IncompatibleEnvironmentError, match=f"^{MAKE_LAYERS}: found"):
        plugin.register()
    assert now(places) == before
