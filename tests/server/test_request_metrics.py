from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from liveprune.pruning.errors import EngineError
from liveprune.server.histogram import Histogram
from liveprune.server.live_metrics import LiveMetrics
from liveprune.server.request_metrics import RequestMetrics
from tests.server.fake_control import FakeControl, view
from tests.server.test_live_metrics import samples

VALUES = {"e2e_seconds": 2.0, "ttft_seconds": 0.5, "inter_token_seconds": 0.1, "output_tokens": 3.0}
BOUNDS = {
    "request_latency": (1.0, 5.0),
    "time_to_first_token": (0.5, 1.0),
    "inter_token_latency": (0.05, 0.075),
    "request_tokens": (1, 5),
}


@pytest.fixture
def requests() -> RequestMetrics:
    return RequestMetrics(lambda family: BOUNDS[family])


def page(requests: RequestMetrics, control: FakeControl | None = None) -> Any:
    metrics = LiveMetrics(control or FakeControl(), requests=requests)
    asyncio.run(metrics.refresh())
    return samples(metrics)


def test_requests_by_variant(requests: RequestMetrics) -> None:
    requests.observe("tiny:full", "ok", VALUES, [])
    requests.observe("tiny:full", "ok", {**VALUES, "e2e_seconds": 0.5}, [])
    requests.observe("tiny:full", "error", {"error": 1.0}, [])
    requests.observe("tiny:full", "aborted", {}, [])
    found = page(requests)
    assert found["liveprune_requests_total"] == {
        # model, outcome, variant
        ("tiny", "ok", "tiny:full"): 2,
        ("tiny", "error", "tiny:full"): 1,
        ("tiny", "aborted", "tiny:full"): 1,
    }
    # le, model, variant
    assert found["liveprune_request_duration_seconds_bucket"] == {
        ("1.0", "tiny", "tiny:full"): 1,
        ("5.0", "tiny", "tiny:full"): 2,
        ("+Inf", "tiny", "tiny:full"): 2,
    }
    assert found["liveprune_request_duration_seconds_sum"] == {("tiny", "tiny:full"): 2.5}
    assert found["liveprune_time_to_first_token_seconds_bucket"]["0.5", "tiny", "tiny:full"] == 2
    assert found["liveprune_inter_token_seconds_bucket"]["0.075", "tiny", "tiny:full"] == 0
    assert found["liveprune_output_tokens_bucket"]["5.0", "tiny", "tiny:full"] == 2
    assert found["liveprune_output_tokens_count"] == {("tiny", "tiny:full"): 2}


def test_sequences_by_end_and_failure(requests: RequestMetrics) -> None:
    judgements = [{"loop": 1.0, "empty": 0.0, "length": 1.0}, {"loop": 1.0, "bad_json": 1.0}]
    requests.observe("tiny:full", "ok", VALUES, judgements)
    for reason in ("length", "stop", "stop"):
        requests.ended("tiny:full", reason)
    found = page(requests)
    assert found["liveprune_finish_reasons_total"] == {
        ("tiny", "length", "tiny:full"): 1,
        ("tiny", "stop", "tiny:full"): 2,
    }
    # kind, model, variant
    assert found["liveprune_degenerate_outputs_total"] == {
        ("loop", "tiny", "tiny:full"): 2,
        ("empty", "tiny", "tiny:full"): 0,
        ("bad_json", "tiny", "tiny:full"): 1,
        ("bad_tool_call", "tiny", "tiny:full"): 0,
    }


def test_the_series_of_a_variant_that_is_not_live_are_gone(requests: RequestMetrics) -> None:
    control = FakeControl(known=[view("full"), replace(view("e4"), state="draining")])
    for name in ("tiny:full", "tiny:e4"):
        requests.observe(name, "ok", VALUES, [])
    variants = {labels[-1] for labels in page(requests, control)["liveprune_requests_total"]}
    assert variants == {"tiny:full", "tiny:e4"}
    control.known[1] = replace(view("e4"), state="standby")
    assert "tiny:e4" not in str(page(requests, control))
    control.known[1] = view("e4")
    again = page(requests, control)["liveprune_requests_total"]
    assert {labels[-1] for labels in again} == {"tiny:full"}, "it begins anew"


def test_an_engine_that_does_not_answer_costs_no_count(requests: RequestMetrics) -> None:
    requests.observe("tiny:full", "ok", VALUES, [])
    control = FakeControl()
    metrics = LiveMetrics(control, requests=requests)
    asyncio.run(metrics.refresh())
    control.error = EngineError("dead")
    asyncio.run(metrics.refresh())
    assert samples(metrics)["liveprune_requests_total"]["tiny", "ok", "tiny:full"] == 1


def test_a_histogram_counts_at_and_below_its_bounds() -> None:
    found = Histogram((1, 2.5))
    for value in (0.0, 1.0, 1.5, 2.5, 9.0):
        found.observe(value)
    assert found.cumulated() == [("1.0", 2), ("2.5", 4), ("+Inf", 5)]
    assert found.total == 14.0
