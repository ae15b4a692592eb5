"""Expert importance against models without the expert; removal counts by hand and by property."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.calibration.rows import Rows
from liveprune.pruning.errors import DataError, PlanError
from liveprune.pruning.methods.moe_i2_counts import expert_losses, load_engine, removal_counts
from liveprune.pruning.model_spec import ModelSpec
from tests import reference
from tests.checkpoints import make_plan

ROWS = Rows(tuple(np.random.default_rng(1).integers(0, 128, n) for n in (9, 1, 5)))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_losses_equal_those_of_models_without_the_expert(
    tiny_model: Callable[..., Path], family: str
) -> None:
    overrides = {"n_group": 1, "topk_group": 1} if family == "deepseek_v3" else {}
    model = tiny_model(family, **overrides)
    spec = ModelSpec.from_path(model)
    steps: list[None] = []
    engine = load_engine(model, ROWS, device="cpu", dtype="float32")
    found = expert_losses(engine, spec, ROWS, spec.layers[1:], lambda: steps.append(None))
    assert list(found) == [x.index for x in spec.layers[1:]]
    assert len(steps) == len(spec.layers) - 1
    last = len(spec.layers) - 1
    for expert in (0, 6):
        kept = [list(range(8)) for _ in spec.layers]
        kept[last].remove(expert)
        pruned = reference.pruned_model(model, make_plan(model, kept))
        logprobs = [
            x for i in (0, 2) for x in reference.prompt_logprobs(pruned, ROWS.token_ids[i].tolist())
        ]
        assert len(logprobs) == 8 + 4
        assert found[spec.layers[last].index][expert] == pytest.approx(-np.mean(logprobs), rel=1e-4)


def test_rows_of_one_token_say_nothing(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("mixtral")
    spec = ModelSpec.from_path(model)
    rows = Rows((np.array([5]), np.array([7])))
    engine = load_engine(model, rows, device="cpu", dtype="float32")
    with pytest.raises(DataError, match="found none with 2 tokens or more"):
        expert_losses(engine, spec, rows, spec.layers, lambda: None)


@pytest.mark.parametrize(
    ("importance", "caps", "removals", "expected"),
    [
        # 1/I is 1, 1/2 and 1/4 of 7/4: of seven removals 4, 2 and 1.
        ([1, 2, 4], [6, 6, 6], 7, [4, 2, 1]),
        # Of six 3.43, 1.71 and 0.86: floors 3, 1, 0, then the remainders .86 and .71.
        ([1, 2, 4], [6, 6, 6], 6, [3, 2, 1]),
        # The first gives its 3 only; the other 4 are shared out 2 to 1: 2.67 and 1.33.
        ([1, 2, 4], [3, 6, 6], 7, [3, 3, 1]),
        # Full twice over: then the second, too, is above its cap of 2.
        ([1, 2, 4], [3, 2, 6], 7, [3, 2, 2]),
        ([1, 1, 1], [4, 4, 4], 4, [2, 1, 1]),
        ([0, 1, 1], [4, 4, 4], 3, [3, 0, 0]),
        ([0, 1, 1], [4, 4, 4], 6, [4, 1, 1]),
        ([math.inf, 1, 3], [4, 4, 4], 4, [0, 3, 1]),
        ([math.inf, 1, 3], [4, 4, 4], 9, [1, 4, 4]),
        ([math.inf, math.inf, 1], [4, 4, 2], 6, [2, 2, 2]),
        ([0, 0, 0], [4, 4, 4], 6, [2, 2, 2]),
        ([1, 2, 4], [2, 2, 2], 6, [2, 2, 2]),
        ([1, 2, 4], [2, 2, 2], 0, [0, 0, 0]),
        ([1, 2, 4], [0, 0, 1], 1, [0, 0, 1]),
    ],
)
def test_counts_by_hand(
    importance: list[float], caps: list[int], removals: int, expected: list[int]
) -> None:
    found = removal_counts(dict(enumerate(importance)), dict(enumerate(caps)), removals)
    assert list(found.items()) == list(enumerate(expected))


layers = st.lists(
    st.tuples(st.floats(0, math.inf, allow_nan=False), st.integers(0, 9)), min_size=1, max_size=6
)


@given(layers, st.floats(0, 1))
def test_counts_are_exact_capped_and_in_order(found: list[tuple[float, int]], share: float) -> None:
    importance = {i: value for i, (value, _) in enumerate(found)}
    caps = {i: cap for i, (_, cap) in enumerate(found)}
    removals = round(share * sum(caps.values()))
    counts = removal_counts(importance, caps, removals)
    assert sum(counts.values()) == removals
    assert all(0 <= counts[i] <= caps[i] for i in caps)
    for i, count in counts.items():
        for j, other in counts.items():
            # More important layers lose no more, unless the other has no more to give; ties and
            # remainders leave one expert of play.
            if importance[i] > importance[j] and other < caps[j]:
                assert count <= other + 1


def test_refusals() -> None:
    with pytest.raises(PlanError, match="layer 1: importance is nan, expected a number from 0 on"):
        removal_counts({0: 1.0, 1: math.nan}, {0: 1, 1: 1}, 1)
    with pytest.raises(PlanError, match="found 3 experts to remove, expected at most 2"):
        removal_counts({0: 1.0, 1: 1.0}, {0: 1, 1: 1}, 3)
