"""What the API server sees of users' requests; candidates' are not counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from liveprune.patches.user_traffic import PROCESS_OUTPUTS, UserTraffic, wrap_process_outputs


class Processor:
    """Stands for vLLM's OutputProcessor."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}


def output(name: str, tokens: int = 1, *, ends: bool = False) -> Any:
    return SimpleNamespace(
        request_id=name, new_token_ids=[7] * tokens, finish_reason="stop" if ends else None
    )


def watched() -> tuple[Processor, UserTraffic, list[float]]:
    processor = Processor()
    traffic = UserTraffic(SimpleNamespace(output_processor=processor))
    steps: list[float] = []
    traffic.listen(steps.append)
    return processor, traffic, steps


def test_users_are_counted_and_candidates_are_not() -> None:
    processor, traffic, _ = watched()
    assert (traffic.in_flight, traffic.waiting) == (0, 0)
    for name, prefilling in (
        ("cmpl-a", True),
        ("cmpl-candidate-1", False),
        ("candidate-x", True),
        ("candidate-y", False),
    ):
        processor.request_states[name] = SimpleNamespace(is_prefilling=prefilling)
    assert (traffic.in_flight, traffic.waiting) == (2, 1)


def test_the_time_between_users_tokens() -> None:
    _, traffic, steps = watched()
    traffic.observe([output("a"), output("candidate-1")], 1.0)
    assert steps == [], "a first token follows none"
    traffic.observe([output("a"), output("b"), output("candidate-1")], 1.5)
    traffic.observe([output("a"), output("b")], 1.75)
    traffic.observe([output("b", 0)], 2.0)
    traffic.observe([output("b", ends=True)], 3.75)
    traffic.observe([output("b")], 4.0)
    traffic.observe([output("a")], 4.75)
    assert steps == pytest.approx([0.5, 0.25, 2.0, 3.0])


def test_aborted_requests_are_forgotten() -> None:
    processor, traffic, _ = watched()
    processor.request_states["kept"] = SimpleNamespace(is_prefilling=False)
    for i in range(100):
        traffic.observe([output(f"aborted-{i}"), output("kept")], float(i))
    assert len(traffic._last) < 25
    assert "kept" in traffic._last


def test_the_wrapper_shows_what_passes_and_changes_nothing() -> None:
    seen: list[Any] = []

    def original(self: Any, *arguments: Any) -> str:
        seen.append(arguments)
        return "answer"

    wrapped = wrap_process_outputs(original)
    processor, _, steps = watched()
    for at in (1.0, 3.0):
        assert wrapped(processor, [output("a")], at, "stats") == "answer"
    assert steps == [2.0]
    assert wrapped(Processor(), [output("a")]) == "answer"
    assert [len(x) for x in seen] == [len(PROCESS_OUTPUTS.parameters) - 1] * 3
