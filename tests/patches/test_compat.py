from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest

from liveprune.patches import compat
from liveprune.patches.compat import Seam, check_seam, check_version
from liveprune.patches.plugin import PATCHES, Patch
from liveprune.pruning.errors import IncompatibleEnvironmentError
from tests.patches.conftest import Places


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7", "0.32.0+cpu", "0.32.1rc1"])
def test_known_versions_pass(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.33.0", "0.3.2", "0.320.0", "1.32.0", "dev", ""])
def test_unknown_versions_are_refused_by_name(version: str) -> None:
    with pytest.raises(IncompatibleEnvironmentError, match=r"patches vLLM 0\.32\.\*") as caught:
        check_version(version)
    assert f"vLLM {version} is installed" in str(caught.value)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: str(patch.seam))
def test_seams_are_in_this_vllm(patch: Patch) -> None:
    """One test for each patched function: fails when vLLM moves it or changes its parameters."""
    check_seam(patch.seam)
    for module in patch.also:
        name = patch.seam.qualname
        assert getattr(importlib.import_module(module), name) is patch.seam.resolve()


def test_interface_of_our_router_is_in_this_vllm() -> None:
    module = "vllm.model_executor.layers.fused_moe.router.base_router"
    parameters = ("self", "hidden_states", "router_logits", "indices_type", "input_ids")
    check_seam(Seam(module, "BaseRouter._compute_routing", parameters))
    check_seam(
        Seam(module, "BaseRouter.__init__", ("self", "top_k", "global_num_experts", "eplb_state"))
    )


def test_loader_method_that_names_the_folder_is_in_this_vllm() -> None:
    check_seam(
        Seam(
            "vllm.model_executor.model_loader.default_loader",
            "DefaultModelLoader._prepare_weights",
            (
                "self",
                "model_name_or_path",
                "subfolder",
                "revision",
                "fall_back_to_pt",
                "allow_patterns_overrides",
            ),
        )
    )


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: str(patch.seam))
def test_drifted_signature_is_refused_by_name(patch: Patch, places: Places) -> None:
    def drifted(self: Any, something: Any) -> None: ...

    owner, name = _owner(patch)
    setattr(owner, name, drifted)
    with pytest.raises(IncompatibleEnvironmentError) as caught:
        check_seam(patch.seam)
    text = str(caught.value)
    assert text.startswith(f"{patch.seam.module}.{patch.seam.qualname}: found the parameters")
    assert "('self', 'something')" in text
    assert str(patch.seam.parameters) in text


def test_missing_function_and_module_are_refused_by_name() -> None:
    with pytest.raises(IncompatibleEnvironmentError, match=r"compat\.gone: not found in this vLLM"):
        check_seam(Seam(compat.__name__, "gone", ()))
    with pytest.raises(IncompatibleEnvironmentError, match=r"vllm\.gone\.it: not found"):
        check_seam(Seam("vllm.gone", "it", ()))


def _owner(patch: Patch) -> tuple[Any, str]:
    owner: Any = sys.modules[patch.seam.module]
    *path, name = patch.seam.qualname.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name
