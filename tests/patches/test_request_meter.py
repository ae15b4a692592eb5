"""What is noted of a request, by vLLM's own OutputProcessor over outputs that a test makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from liveprune.patches.admission import serving
from liveprune.patches.request_meter import Generation, Meter, response_id
from tests.patches.front_end import E4, patch_vllm

PROMPT = [5, 6, 7]
Processors = Callable[..., Any]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> Processors:
    from transformers import AutoTokenizer
    from vllm.v1.engine.output_processor import OutputProcessor

    patch_vllm(monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("mixtral"))
    return lambda **options: OutputProcessor(tokenizer, **{"log_stats": False, **options})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Sets what time it is."""
    now = [0.0]
    monkeypatch.setattr("liveprune.patches.request_meter.time.monotonic", lambda: now[0])

    def set_to(seconds: float) -> None:
        now[0] = seconds

    return set_to


def request(name: str, external: str | None = None, **sampling: Any) -> Any:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id=name,
        external_req_id=external or name,
        prompt_token_ids=list(PROMPT),
        mm_features=None,
        sampling_params=SamplingParams(**{"max_tokens": 99, **sampling}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def output(name: str, *tokens: int, finish: str | None = None, events: Any = None) -> Any:
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    reason = None if finish is None else FinishReason[finish.upper()]
    return EngineCoreOutput(name, list(tokens), finish_reason=reason, events=events)


def metered(processor: Any, *requests: Any, meter: Meter | None = None) -> Meter:
    meter = meter or Meter()
    with serving(E4, meter=meter):
        for made in requests:
            processor.add_request(made, None)
    return meter


def test_times_and_tokens_of_a_request(
    processor: Processors, clock: Callable[[float], None]
) -> None:
    made = processor()
    asked = request("a", "cmpl-a", temperature=0.5)
    meter = metered(made, asked)
    (found,) = meter.generations()
    assert (meter.first, found.first, found.last, found.finish) == (None, None, None, None)
    for at, step in (
        (1.0, [output("a"), output("b", 1)]),  # a prompt that is read in parts has no token yet
        (2.0, [output("a", 40)]),
        (3.0, [output("a", 41, 42)]),
        (4.5, [output("a", 43, finish="length")]),
        (9.0, [output("a", 44)]),
    ):
        clock(at)
        made.process_outputs(step)
    (found,) = meter.generations()
    assert found == Generation(
        request="cmpl-a",
        prompt=PROMPT,
        prompt_tokens=3,
        tokens=[40, 41, 42, 43],
        text=made.tokenizer.decode([40, 41, 42, 43]),
        finish="length",
        first=2.0,
        last=4.5,
        queue_seconds=None,
        sampling=asked.sampling_params,
    )
    assert meter.first == 2.0


def test_a_closed_meter_follows_nothing_more(
    processor: Processors, clock: Callable[[float], None]
) -> None:
    made = processor()
    meter, other = metered(made, request("a")), metered(made, request("b"))
    clock(1.0)
    made.process_outputs([output("a", 40), output("b", 41)])
    meter.close()
    clock(2.0)
    made.process_outputs([output("a", 42, finish="length"), output("b", 43)])
    assert [(x.first, x.last, x.finish) for x in meter.generations()] == [(1.0, 1.0, None)]
    assert [x.last for x in other.generations()] == [2.0]
    other.close()
    assert made.liveprune_sequences == {}


def test_a_stop_string_ends_a_sequence_that_the_engine_has_not_ended(processor: Processors) -> None:
    made = processor()
    text = made.tokenizer.decode([40, 41])
    meter = metered(made, request("a", stop=[made.tokenizer.decode([41])]))
    assert made.process_outputs([output("a", 40, 41, 42)]).reqs_to_abort == ["a"]
    (found,) = meter.generations()
    assert (found.finish, list(found.tokens)) == ("stop", [40, 41])
    assert found.text == made.tokenizer.decode([40])
    assert found.text != text


@pytest.mark.parametrize("finish", ["stop", "length", "repetition", "error"])
def test_ends_are_named_as_vllm_does(finish: str, processor: Processors) -> None:
    made = processor()
    meter = metered(made, request("a"))
    made.process_outputs([output("a", 40, finish=finish)])
    assert [x.finish for x in meter.generations()] == [finish]


def test_an_aborted_sequence_has_no_end(processor: Processors) -> None:
    made = processor()
    meter = metered(made, request("a"))
    made.process_outputs([output("a", 40)])
    made.abort_requests(["a"], internal=True)
    assert [(x.finish, list(x.tokens)) for x in meter.generations()] == [(None, [40])]


def test_sequences_of_one_prompt_share_its_name(
    processor: Processors, clock: Callable[[float], None]
) -> None:
    """``n`` > 1: vLLM gives children names of their own and keeps the external one."""
    made = processor()
    children = [request(f"{i}_a", "cmpl-a") for i in range(2)]
    meter = metered(made, *children, request("b", "cmpl-b"))
    clock(1.0)
    made.process_outputs([output("1_a", 50, finish="length")])
    clock(2.0)
    made.process_outputs([output("0_a", 40, finish="stop")])
    found = [(x.request, x.first, list(x.tokens)) for x in meter.generations()]
    assert found == [("cmpl-a", 2.0, [40]), ("cmpl-a", 1.0, [50]), ("cmpl-b", None, [])]
    assert meter.first == 1.0


def test_what_has_no_meter_is_not_followed(processor: Processors) -> None:
    made = processor()
    made.add_request(request("a"), None)
    with serving(E4):
        made.add_request(request("b"), None)
    made.process_outputs([output("a", 40, finish="stop"), output("b", 40, finish="stop")])
    assert not hasattr(made, "liveprune_sequences")


def test_time_in_the_queue_comes_from_the_engines_events(processor: Processors) -> None:
    from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType
    from vllm.v1.metrics.stats import IterationStats

    made = processor(log_stats=True)
    meter = metered(made, request("a"))
    assert [x.queue_seconds for x in meter.generations()] == [None]
    events = [
        EngineCoreEvent.new_event(EngineCoreEventType.QUEUED, 10.0),
        EngineCoreEvent.new_event(EngineCoreEventType.SCHEDULED, 10.25),
        EngineCoreEvent.new_event(EngineCoreEventType.PREEMPTED, 10.5),
        EngineCoreEvent.new_event(EngineCoreEventType.SCHEDULED, 11.5),
    ]
    made.process_outputs([output("a", 40, events=events)], 12.0, IterationStats())
    assert [x.queue_seconds for x in meter.generations()] == [0.25]


def test_without_detokenizing_there_is_no_text(processor: Processors) -> None:
    made = processor()
    meter = metered(made, request("a", detokenize=False))
    made.process_outputs([output("a", 40, finish="length")])
    assert [(x.text, list(x.tokens)) for x in meter.generations()] == [(None, [40])]


def test_more_of_a_streamed_input_is_the_same_sequence(processor: Processors) -> None:
    made = processor()
    first, more = request("a"), request("a")
    first.resumable = more.resumable = True
    meter = metered(made, first)
    made.process_outputs([output("a", 40)])
    metered(made, more, meter=meter)
    assert [x.first is not None for x in meter.generations()] == [True]


def test_the_id_of_an_answer() -> None:
    assert response_id({}) is None
    assert response_id({"state": {}}) is None
    assert response_id({"state": {"request_metadata": SimpleNamespace(request_id="x")}}) == "x"
