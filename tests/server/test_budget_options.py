from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.server import budget_options
from liveprune.server.budget_options import allowed_counts

NAMES = [
    "E=8,N=48,device_name=A.json",
    "E=6,N=48,device_name=A.json",
    "E=4,N=48,device_name=A.json",
    "E=3,N=48,device_name=B.json",
    "E=5,N=48,device_name=A,dtype=fp8_w8a8.json",
    "E=2,N=96,device_name=A.json",
]


@pytest.fixture
def spec(tiny_model: Callable[..., Path]) -> ModelSpec:
    """8 experts of size 48 in each layer."""
    return ModelSpec.from_path(tiny_model("mixtral"))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Pretend that vLLM ships ``NAMES``, and that the GPU has this name ("": there is none)."""

    def pretend(gpu: str) -> None:
        monkeypatch.setattr(budget_options, "config_names", lambda: NAMES)
        monkeypatch.setattr(budget_options, "this_gpu", lambda: gpu)

    return pretend


def test_without_a_wish_any_count_will_do(spec: ModelSpec) -> None:
    assert allowed_counts(spec, None, 1) is None


@pytest.mark.parametrize(
    ("snap", "ranks", "right"),
    [
        ("servable", 1, {1, 2, 3, 4, 5, 6, 7, 8}),
        ("servable", 2, {2, 4, 6, 8}),
        ("servable", 3, {3, 6}),
        ("servable", 8, {8}),
        ("3", 1, {3, 6}),
        ("3", 2, {6}),
        ("4", 2, {4, 8}),
        ("2", 4, {4, 8}),
        ("1", 1, {1, 2, 3, 4, 5, 6, 7, 8}),
        ("8", 1, {8}),
        ("08", 1, {8}),
    ],
)
def test_counts_by_hand(snap: str, ranks: int, right: set[int], spec: ModelSpec) -> None:
    assert allowed_counts(spec, snap, ranks) == right


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("step", range(1, 9))
def test_multiples_that_ranks_can_share(step: int, ranks: int, spec: ModelSpec) -> None:
    right = {n for n in range(1, 9) if n % step == 0 and n % ranks == 0}
    if right:
        assert allowed_counts(spec, str(step), ranks) == right
    else:
        with pytest.raises(PlanError, match=f"--snap {step}: found no count that {ranks} ranks"):
            allowed_counts(spec, str(step), ranks)


@pytest.mark.parametrize(
    ("gpu", "ranks", "right"),
    [
        ("A", 1, {4, 6, 8}),
        ("A", 4, {4, 8}),
        ("A", 3, {6}),
        ("B", 1, {3}),
        ("", 1, {3, 4, 6, 8}),
        ("", 3, {3, 6}),
    ],
)
def test_tuned_counts_by_hand(
    gpu: str, ranks: int, right: set[int], spec: ModelSpec, on_gpu: Callable[[str], None]
) -> None:
    """Of this size and unquantised; without a GPU, those of any."""
    on_gpu(gpu)
    assert allowed_counts(spec, "tuned", ranks) == right


def test_no_tuned_kernel_is_said_by_size_and_gpu(
    spec: ModelSpec, on_gpu: Callable[[str], None], tiny_model: Callable[..., Path]
) -> None:
    on_gpu("C")
    with pytest.raises(PlanError, match="fewer than 8 experts of size 48 on C; expected servable"):
        allowed_counts(spec, "tuned", 1)
    on_gpu("")
    other = ModelSpec.from_path(tiny_model("qwen2_moe"))
    assert other.expert_size == 32
    with pytest.raises(PlanError, match="experts of size 32 on any GPU"):
        allowed_counts(other, "tuned", 1)


def test_a_kernel_for_the_full_count_alone_is_none(
    spec: ModelSpec, on_gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu("A")
    monkeypatch.setattr(budget_options, "config_names", lambda: NAMES[:1])
    with pytest.raises(PlanError, match="no tuned kernel for fewer than 8 experts"):
        allowed_counts(spec, "tuned", 1)


@pytest.mark.parametrize("snap", ["", "0", "-2", "+2", "2.0", "half", "Tuned", " 2", "²"])
def test_other_words_are_refused(snap: str, spec: ModelSpec) -> None:
    with pytest.raises(PlanError, match="expected servable, tuned or a number such as 8") as caught:
        allowed_counts(spec, snap, 1)
    assert f"--snap: found {snap!r}" in str(caught.value)


@pytest.mark.parametrize("snap", ["9", "80"])
def test_a_step_beyond_all_experts_is_refused(snap: str, spec: ModelSpec) -> None:
    with pytest.raises(PlanError, match=f"--snap {snap}: found no count, expected some up to 8"):
        allowed_counts(spec, snap, 1)


def test_ranks_that_cannot_share_any_count(spec: ModelSpec, on_gpu: Callable[[str], None]) -> None:
    with pytest.raises(PlanError, match="--snap servable: found no count that 16 ranks can share"):
        allowed_counts(spec, "servable", 16)
    on_gpu("B")
    with pytest.raises(PlanError, match="--snap tuned: found no count that 2 ranks can share"):
        allowed_counts(spec, "tuned", 2)


def test_ranks_alone_are_refused_rather_than_forgotten(spec: ModelSpec) -> None:
    with pytest.raises(PlanError, match="--expert-parallel 4: found without --snap"):
        allowed_counts(spec, None, 4)
