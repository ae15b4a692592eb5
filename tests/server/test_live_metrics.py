from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from liveprune.pruning.errors import EngineError
from liveprune.server import live_metrics
from liveprune.server.live_metrics import LiveMetrics, published
from liveprune.server.operations import Operation, State
from tests.server.fake_control import FakeControl, view
from tests.server.full_metrics import full_metrics

_FINDING = {"measure", "role"}
CLOSED = {
    "liveprune_variant_info": {"experts", "top_k", "digest"},
    "liveprune_requests": {"outcome"},
    "liveprune_finish_reasons": {"reason"},
    "liveprune_degenerate_outputs": {"kind"},
    "liveprune_jobs": {"state"},
    "liveprune_experiments": {"state"},
    "liveprune_experiments_last_end_timestamp_seconds": {"state"},
    "liveprune_experiment_verdict": {"verdict"},
    "liveprune_experiment_difference": _FINDING,
    "liveprune_experiment_difference_lower": _FINDING,
    "liveprune_experiment_difference_upper": _FINDING,
    "liveprune_experiment_difference_limit": _FINDING,
}
"""Further labels of some families, each with few values."""


def samples(metrics: LiveMetrics) -> dict[str, dict[tuple[str, ...], float]]:
    """By name, then by the values of the labels in alphabetical order of the names."""
    page, _ = metrics.page("")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            values = tuple(sample.labels[key] for key in sorted(sample.labels))
            found.setdefault(sample.name, {})[values] = sample.value
    return found


def refreshed(control: FakeControl) -> LiveMetrics:
    metrics = LiveMetrics(control)
    asyncio.run(metrics.refresh())
    return metrics


def ended(kind: str, state: State, seconds: float) -> Operation:
    return Operation(kind, "tiny:e4", state=state, created=1000.0, finished=1000.0 + seconds)


def with_operations(*operations: Operation) -> FakeControl:
    return FakeControl(made={operation.id: operation for operation in operations})


def test_variants_that_answer_have_series_and_others_have_none() -> None:
    e4 = view(
        "e4",
        state="draining",
        experts={"min": 3, "max": 8, "total": 16},
        top_k={"min": 1, "max": 2},
        row_bytes=700,
        in_flight=5,
    )
    others = [view("e2", state="standby"), view("e1", state="preparing")]
    found = samples(refreshed(FakeControl(known=[view("full"), e4, *others])))
    assert found["liveprune_variant_info"] == {
        # digest, experts, model, top_k, variant
        ("", "8", "tiny", "2", "tiny:full"): 1,
        ("digest-e4", "3-8", "tiny", "1-2", "tiny:e4"): 1,
    }
    assert found["liveprune_variant_row_bytes"] == {
        ("tiny", "tiny:full"): 2400,
        ("tiny", "tiny:e4"): 700,
    }
    assert found["liveprune_variant_requests_in_flight"][("tiny", "tiny:e4")] == 5


def test_the_series_of_a_retired_variant_are_gone() -> None:
    control = FakeControl(known=[view("full"), view("e4")])
    metrics = refreshed(control)
    assert b"tiny:e4" in metrics.page("")[0]
    control.known = [view("full"), replace(view("e4"), state="standby")]
    asyncio.run(metrics.refresh())
    assert b"tiny:e4" not in metrics.page("")[0]
    assert b"tiny:full" in metrics.page("")[0]


def test_the_engine_has_one_value_each() -> None:
    found = samples(refreshed(FakeControl()))
    expected = {
        "liveprune_expert_bytes": 1000,
        "liveprune_spare_bytes": 200,
        "liveprune_other_weight_bytes": 30,
        "liveprune_kv_cache_bytes": 4000,
        "liveprune_kv_cache_blocks": 40,
        "liveprune_process_resident_bytes": 9000,
        "liveprune_memory_target_bytes": 6000,
        "liveprune_operation_in_progress": 0,
    }
    assert {name: found[name] for name in expected} == {
        name: {("tiny",): value} for name, value in expected.items()
    }


def test_an_operation_under_way_shows() -> None:
    control = with_operations(Operation("swap", "tiny:e4", state=State.DRAINING))
    assert samples(refreshed(control))["liveprune_operation_in_progress"] == {("tiny",): 1}


def test_without_a_bound_there_is_no_series(monkeypatch: pytest.MonkeyPatch) -> None:
    control = FakeControl()
    status = asyncio.run(control.status())

    async def unbounded() -> Any:
        return replace(status, memory_target_bytes=None)

    monkeypatch.setattr(control, "status", unbounded)
    assert "liveprune_memory_target_bytes" not in samples(refreshed(control))


def test_swaps_are_counted_once_each_by_outcome() -> None:
    control = with_operations(
        ended("swap", State.DONE, 0.2),
        ended("rollback", State.DONE, 5.0),
        ended("swap", State.FAILED, 4000.0),
        ended("add", State.DONE, 1.0),
        Operation("swap", "tiny:e4", state=State.FILLING),
    )
    metrics = refreshed(control)
    asyncio.run(metrics.refresh())
    found = samples(metrics)
    assert found["liveprune_swaps_total"] == {
        ("tiny", "done"): 2,
        ("tiny", "failed"): 1,
        ("tiny", "cancelled"): 0,
    }
    durations = "liveprune_swap_duration_seconds"
    assert found[f"{durations}_sum"][("tiny", "done")] == pytest.approx(5.2)
    assert found[f"{durations}_count"][("tiny", "done")] == 2
    buckets = found[f"{durations}_bucket"]
    # le, model, outcome; a bucket holds its own bound.
    done = {le: value for (le, _, outcome), value in buckets.items() if outcome == "done"}
    assert (done["0.1"], done["0.25"], done["2.5"], done["5.0"], done["+Inf"]) == (0, 1, 1, 2, 2)
    assert buckets[("1800.0", "tiny", "failed")] == 0
    assert buckets[("+Inf", "tiny", "failed")] == 1


def test_an_operation_counts_when_it_ends_and_stays_counted_when_forgotten() -> None:
    running = Operation("swap", "tiny:e4", state=State.FILLING, created=1000.0)
    control = with_operations(running)
    metrics = refreshed(control)
    assert samples(metrics)["liveprune_swaps_total"][("tiny", "cancelled")] == 0
    running.state, running.finished = State.CANCELLED, 1001.0
    asyncio.run(metrics.refresh())
    control.made.clear()
    asyncio.run(metrics.refresh())
    assert samples(metrics)["liveprune_swaps_total"][("tiny", "cancelled")] == 1


def test_golden_mismatches_are_passed_on() -> None:
    control = FakeControl()
    metrics = refreshed(control)
    assert samples(metrics)["liveprune_canary_mismatches_total"] == {("tiny",): 0}
    control.golden_mismatches = 2
    assert samples(metrics)["liveprune_canary_mismatches_total"] == {("tiny",): 2}


@pytest.mark.parametrize("failure", ["error", "defect", "hangs"])
def test_an_engine_that_does_not_answer_leaves_the_counts(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = with_operations(ended("swap", State.DONE, 1.0))
    metrics = refreshed(control)
    if failure == "hangs":
        monkeypatch.setattr(live_metrics, "STATUS_TIMEOUT", 0.01)
        monkeypatch.setattr(control, "status", lambda: asyncio.sleep(3600))
    else:
        control.error = EngineError("dead") if failure == "error" else KeyError("defect")
    asyncio.run(metrics.refresh())
    found = samples(metrics)
    assert found["liveprune_swaps_total"][("tiny", "done")] == 1
    assert "liveprune_expert_bytes" not in found
    assert "liveprune_variant_info" not in found


def test_names_and_labels_keep_the_rules() -> None:
    metrics = full_metrics()
    families = list(text_string_to_metric_families(metrics.page("")[0].decode()))
    assert len(families) == 40
    for family in families:
        assert re.fullmatch(r"liveprune_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        for sample in family.samples:
            labels = set(sample.labels) - {"le"}
            labels -= CLOSED.get(family.name, set())
            assert labels <= {"model", "variant", "outcome", "experiment", "arm"}
            if family.name.endswith("_timestamp_seconds"):
                assert family.type == "gauge"
            elif family.name.endswith("_seconds") or sample.name.endswith("_total"):
                assert family.type in ("histogram", "counter")


def test_what_is_described_is_what_is_collected() -> None:
    metrics = refreshed(FakeControl())
    described = [(family.name, family.type) for family in metrics.describe()]
    assert described == [(family.name, family.type) for family in metrics.collect()]
    assert not any(family.samples for family in metrics.describe())


def test_the_public_page_shows_them_while_published() -> None:
    control = FakeControl()

    async def run() -> None:
        async with published(LiveMetrics(control), every=0.01):
            # Until the first snapshot there is nothing to show; then changes follow.
            for tag in ("e4", "e2"):
                control.known = [view(tag)]
                async with asyncio.timeout(30):
                    shown = f'variant="tiny:{tag}"'.encode()
                    while shown not in generate_latest(REGISTRY):  # noqa: ASYNC110 - as a scraper
                        await asyncio.sleep(0.01)
        assert b"liveprune" not in generate_latest(REGISTRY)

    asyncio.run(run())


def test_the_same_names_twice_are_refused() -> None:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(LiveMetrics(FakeControl()))

    async def run() -> None:
        async with published(LiveMetrics(FakeControl()), registry):
            pass

    with pytest.raises(ValueError, match="liveprune_variant_info"):
        asyncio.run(run())


def test_nothing_is_written_in_multiprocess_mode(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    found = samples(refreshed(with_operations(ended("swap", State.DONE, 1.0))))
    assert found["liveprune_swaps_total"][("tiny", "done")] == 1
    assert list(tmp_path.iterdir()) == []
