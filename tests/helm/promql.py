"""Which metrics, and which of their labels, a PromQL expression uses."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from liveprune.server.live_metrics import LiveMetrics
from tests.server.fake_control import FakeControl

_SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "info": ("_info",),
    "gauge": ("",),
}
_KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
OF_TARGETS = {"job", "instance", "namespace"}
"""Labels that Prometheus adds."""
_OF_VLLM = {"model_name", "engine"}


def known_metrics() -> dict[str, set[str]]:
    """Series that a server has, ours and vLLM's, by name, with their labels."""
    found = {"up": set[str]()}
    for family in LiveMetrics(FakeControl()).describe():
        for suffix in _SUFFIXES[family.type]:
            labels = {*family._labelnames} | ({"le"} if suffix == "_bucket" else set())
            if suffix == "_info":
                labels |= {"experts", "top_k", "digest"}
            found[family.name + suffix] = labels
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    return {**found, **dict.fromkeys(re.findall(r'name="(vllm:\w+)"', source), _OF_VLLM)}


def used(promql: str) -> dict[str, set[str]]:
    """Metrics of an expression, each with the labels that matchers name."""
    text = re.sub(r"#.*", "", promql)
    text = re.sub(r'"[^"]*"', '""', text)
    text = re.sub(r"\[[^]]*\]", "", text)  # ranges
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", text)
    text = re.sub(r"\boffset\s+\w+", " ", text)
    found: dict[str, set[str]] = {}
    for name, matchers, call in re.findall(
        r"(?<![\w:.])([a-zA-Z_:][\w:]*)\s*(?:\{([^}]*)\}|(\())?", text
    ):
        if not call and name.lower() not in _KEYWORDS:
            found.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers))
    return found


def grouped_by(promql: str) -> set[str]:
    """Labels that an expression groups or matches by."""
    lists = re.findall(r"\b(?:by|on|group_left)\s*\(([^)]*)\)", promql)
    return {label.strip() for each in lists for label in each.split(",")} - {""}
