"""Warnings about expert counts without tuned kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from liveprune.patches import tuned_kernels
from liveprune.patches.tuned_kernels import compare, untuned
from liveprune.pruning.model_spec import ModelSpec

NAMES = [
    "E=8,N=14336,device_name=A.json",
    "E=8,N=14336,device_name=B.json",
    "E=4,N=14336,device_name=A.json",
    "E=2,N=14336,device_name=B,dtype=fp8_w8a8.json",
    "E=2,N=7168,device_name=A.json",
    "README",
]


def test_a_count_that_loses_its_kernel_is_named() -> None:
    found = compare(NAMES, 14336, {8}, {2, 4}, "A")
    assert found is not None
    assert "on A, but not for 2 experts of size 14336" in found


def test_other_dtypes_and_sizes_do_not_count() -> None:
    assert compare(NAMES, 14336, {8}, {2}, "B") is not None
    assert compare(NAMES, 14336, {8}, {4}, "A") is None


def test_without_a_gpu_all_that_have_one_for_the_full_model_are_looked_at() -> None:
    found = compare(NAMES, 14336, {8}, {4}, "")
    assert found is not None
    assert "on A, B, but not for 4 experts" in found


def test_nothing_is_said_where_the_full_model_has_no_tuned_kernel_either() -> None:
    assert compare(NAMES, 999, {8}, {4}, "A") is None
    assert compare(NAMES, 14336, {8}, {4}, "C") is None
    assert compare(NAMES, 14336, {8}, {8}, "A") is None


def test_live_variants_of_several_full_counts_need_them_all() -> None:
    assert compare(NAMES, 14336, {8, 16}, {4}, "A") is None


def test_vllms_own_files_are_found(tiny_model: Callable[..., Path]) -> None:
    folder = Path(tuned_kernels.find_spec("vllm").origin).parent / tuned_kernels.CONFIGS
    assert any(tuned_kernels._NAME.fullmatch(path.name) for path in folder.iterdir())
    assert untuned(ModelSpec.from_path(tiny_model("mixtral")), {4}) is None
