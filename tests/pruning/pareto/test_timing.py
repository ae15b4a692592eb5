from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from liveprune.pruning.errors import DataError, EngineError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.pareto.timing import Pace, Ratio, Speed, Workload, measure, middle, speeds
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from tests.pruning.search.fakes import spec_of

TEXT = list(range(100))


def plan_of(spec: ModelSpec, kept: Sequence[int] = (0, 1), top_k: int = 1) -> Plan:
    layers = [LayerPlan(x.index, x.experts, top_k, tuple(kept)) for x in spec.layers]
    return Plan(
        spec.architecture.model_type, spec.num_hidden_layers, tuple(layers), Lineage("test")
    )


class Stopwatch:
    """An engine whose clock says what its work takes: 2 s a call, then by the token."""

    def __init__(self, full: tuple[float, float], plan: tuple[float, float]) -> None:
        self.seconds = {"full": full, "plan": plan}
        self.now = 0.0
        self.calls: list[tuple[str, int, int]] = []

    def clock(self) -> tuple[float, float]:
        return self.now, 2 * self.now

    def generate(
        self, plans: Sequence[Any], prompts: Sequence[Sequence[int]], *, max_tokens: int, end: Any
    ) -> list[Any]:
        assert not end
        (plan,) = plans
        side = "full" if plan is None else "plan"
        read, write = self.seconds[side]
        self.calls.append((side, len(prompts[0]), max_tokens))
        self.now += 2 + read * sum(map(len, prompts)) + write * len(prompts) * (max_tokens - 1)
        return []


def workload(**changes: int) -> Workload:
    arguments = {"batch": 2, "prompt_tokens": 20, "new_tokens": 5, "rounds": 3, **changes}
    return Workload.of([TEXT], **arguments)


def test_speeds_by_hand() -> None:
    engine = Stopwatch(full=(0.01, 0.5), plan=(0.02, 0.2))
    work = workload()
    sample = measure(engine, plan_of(spec_of()), work, engine.clock)  # type: ignore[arg-type]
    found = speeds(sample, work)["plan"]
    # 2 prompts of 20 - 8 tokens in 0.02 s each, 2 of 4 further tokens in 0.2 s each.
    assert (work.prefill_tokens, work.decode_tokens) == (24, 8)
    assert found.prefill.tokens_per_second == pytest.approx(50)
    assert found.decode.tokens_per_second == pytest.approx(5)
    assert found.prefill.wall.median == pytest.approx(0.5)
    assert found.decode.wall.median == pytest.approx(2.5)
    assert found.decode.cpu == Ratio(*[pytest.approx(2.5)] * 3)
    full = speeds(sample, work)["full"]
    assert full.decode.tokens_per_second == pytest.approx(2)
    assert full.decode.wall == Ratio(1.0, 1.0, 1.0)


def test_sides_take_turns_after_a_round_that_is_dropped() -> None:
    engine = Stopwatch(full=(0.01, 0.5), plan=(0.02, 0.2))
    sample = measure(engine, plan_of(spec_of()), workload(), engine.clock)  # type: ignore[arg-type]
    one = [(8, 1), (20, 1), (8, 5)]
    both = [("full", *x) for x in one] + [("plan", *x) for x in one]
    assert engine.calls == both * 4
    assert len(sample["full"]) == len(sample["plan"]) == 3


def test_ratios_are_of_rounds() -> None:
    """A machine that is half as fast in the second round slows both."""
    rounds = {
        "full": [[[0, 0], [4, 4], [4, 4]], [[0, 0], [8, 8], [8, 8]], [[0, 0], [4, 4], [6, 4]]],
        "plan": [[[0, 0], [2, 2], [4, 4]], [[0, 0], [4, 4], [4, 4]], [[0, 0], [2, 2], [2, 1]]],
    }
    found = speeds(rounds, workload())["plan"]
    assert found.prefill.wall == Ratio(2.0, 2.0, 2.0)
    assert found.decode.wall == Ratio(2.0, 1.0, 3.0)
    assert found.decode.cpu == Ratio(2.0, 1.0, 4.0)


def test_cpu_time_that_cannot_be_told_is_left_out() -> None:
    rounds = [[[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]] * 3
    found = speeds({"full": rounds, "plan": rounds}, workload())["plan"]
    assert found.decode.cpu is None
    assert found.decode.wall.median == 1


def test_a_workload_that_is_lost_in_noise_is_said_to_be() -> None:
    rounds = [[[1.0, 0.0], [2.0, 0.0], [0.9, 0.0]]] * 3
    with pytest.raises(EngineError, match=r"decode: found 8 tokens that took -100.000 ms more"):
        speeds({"full": rounds, "plan": rounds}, workload())


def test_prompts_are_cut_from_the_text_again_and_again() -> None:
    found = Workload.of([[1, 2, 3], [4, 5, 6, 7]], batch=2, prompt_tokens=9, new_tokens=2, rounds=3)
    assert found.prompts == ((1, 2, 3, 4, 5, 6, 7, 1, 2), (3, 4, 5, 6, 7, 1, 2, 3, 4))
    assert found.longest == 11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": 8}, r"found \[8\] tokens, expected one length above 8"),
        ({"new_tokens": 1}, "new_tokens is 1"),
        ({"rounds": 2}, "rounds is 2, expected at least 3"),
        ({"batch": 0}, "found 0 of 20 tokens"),
    ],
)
def test_refusals(changes: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        workload(**changes)


def test_the_full_model_is_the_middle_of_its_turns_beside_all_plans() -> None:
    one = Ratio(1.0, 1.0, 1.0)

    def speed(prefill: float, decode: float, cpu: Ratio | None) -> Speed:
        return Speed(Pace(prefill, one, cpu), Pace(decode, one, None))

    found = middle([speed(10, 7, None), speed(90, 5, one), speed(20, 6, None)])
    assert found == speed(20, 6, one)
