"""vLLM's own spans, as an exporter of OpenTelemetry gets them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from liveprune.patches import admission, request_spans
from liveprune.patches.admission import serving
from liveprune.patches.request_spans import REQUEST_MODEL, RESPONSE_MODEL
from tests.patches.front_end import E4, NAME, FakeDirectory, patch_vllm
from tests.patches.test_request_meter import output, request

export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

Spans = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    """Attributes of the spans so far."""
    import vllm.tracing
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    patch_vllm(monkeypatch)
    wrapped = request_spans.wrap_instrument(inspect.unwrap(vllm.tracing.instrument_manual))
    for module in (request_spans.INSTRUMENT.module, *request_spans.INSTRUMENT_USERS):
        monkeypatch.setattr(f"{module}.instrument_manual", wrapped)
    exporter = export.InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("vllm.tracing.otel.trace.get_tracer", provider.get_tracer)
    return lambda: [dict(span.attributes) for span in exporter.get_finished_spans()]


def answer(processor: Any, name: str) -> None:
    from vllm.v1.metrics.stats import IterationStats

    processor.process_outputs([output(name, 40, finish="length")], 12.0, IterationStats())


def processor() -> Any:
    from vllm.v1.engine.output_processor import OutputProcessor

    return OutputProcessor(None, log_stats=True, tracing_enabled=True)


def test_spans_say_what_was_asked_and_what_answered(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = processor()
    monkeypatch.setattr(admission, "_directory", FakeDirectory())
    with admission.admitting() as admitted:
        admitted.admit(NAME)
        made.add_request(request("a"), None)
    answer(made, "a")
    (found,) = spans()
    assert (found[REQUEST_MODEL], found[RESPONSE_MODEL]) == (NAME, E4.name)
    assert found["gen_ai.request.id"] == "a", "vLLM's own stay"


def test_each_span_has_its_own_names(spans: Spans) -> None:
    made = processor()
    with serving(E4):
        made.add_request(request("a"), None)
    made.add_request(request("b"), None)
    answer(made, "a")
    answer(made, "b")
    named, plain = spans()
    assert (named[REQUEST_MODEL], named[RESPONSE_MODEL]) == (E4.name, E4.name)
    assert REQUEST_MODEL not in plain
    assert RESPONSE_MODEL not in plain


def test_other_spans_are_left_alone(spans: Spans) -> None:
    import vllm.tracing

    own = {"own": 1}
    vllm.tracing.instrument_manual("other", 0, attributes=own)
    assert spans() == [own]
    assert request_spans._names.get() is None


def test_a_failing_span_leaves_no_name_behind() -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("broken")

    state = type("State", (), {})()
    request_spans.name_span(state, asked="a", answered="b")
    with pytest.raises(RuntimeError, match="broken"):
        request_spans.wrap_do_tracing(fails)(None, None, state, None)
    assert request_spans._names.get() is None
