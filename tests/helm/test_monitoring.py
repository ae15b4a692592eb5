"""Alert rules and dashboard: what they ask for exists, and what they say is documented."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.manifests import CHART, Helm, Manifest, Render, one
from tests.helm.promql import OF_TARGETS, grouped_by, known_metrics, used
from tests.server.prometheus import promtool

RULES = CHART / "rules" / "liveprune.yaml"
RULE_TESTS = Path(__file__).parent / "rules_test.yaml"
DASHBOARD = CHART / "dashboards" / "liveprune.json"
OPERATIONS = CHART.parent.parent / "docs" / "operations.md"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def groups() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
    return found


def rules(kind: str) -> list[dict[str, Any]]:
    return [rule for group in groups() for rule in group["rules"] if kind in rule]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """Where it is, and what."""
    for rule in [*rules("record"), *rules("alert")]:
        yield rule.get("record") or rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for note in dashboard()["annotations"]["list"]:
        yield note["name"], note["expr"]


def test_promql_is_read() -> None:
    assert used('sum by (a) (rate(x:y{b="c d",e!~"f"}[5m] offset 1h)) / 2 * z > on (a) up # w') == {
        "x:y": {"b", "e"},
        "z": set(),
        "up": set(),
    }
    assert grouped_by("sum by (a, b) (x) > on (c) group_left () y") == {"a", "b", "c"}


def test_every_metric_and_label_exists() -> None:
    """A metric that is renamed makes an alert silent and a panel empty; nobody would see it."""
    known = known_metrics() | {rule["record"]: {"model", "variant"} for rule in rules("record")}
    seen = set()
    for where, expression in expressions():
        names = used(expression)
        assert names, where
        for name, labels in names.items():
            assert name in known, where
            assert labels <= known[name] | OF_TARGETS, where
        labels = {label for name in names for label in known[name]}
        assert grouped_by(expression) <= labels | OF_TARGETS, where
        seen.update(names)
    # And no family is in neither.
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in known if name != "up"}
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in seen}
    assert {name for name in families - shown if name.startswith("liveprune_")} == set()


def test_rules_are_valid() -> None:
    found = promtool("check", "rules", str(RULES))
    assert found.returncode == 0, found.stderr
    assert f"{len(rules('record')) + len(rules('alert'))} rules found" in found.stdout


def test_alerts_fire_when_they_should() -> None:
    found = promtool("test", "rules", str(RULE_TESTS))
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    cases: dict[str, set[bool]] = {}
    for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            cases.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert cases == {rule["alert"]: {False, True} for rule in rules("alert")}


def test_every_alert_is_explained() -> None:
    headings = set(re.findall(r"^### (\w+)$", OPERATIONS.read_text(), re.MULTILINE))
    assert headings == {rule["alert"] for rule in rules("alert")}
    for rule in rules("alert"):
        notes = rule["annotations"]
        assert notes["summary"]
        assert notes["description"].endswith(".")
        assert notes["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_panels() -> None:
    document = dashboard()
    ids = [panel["id"] for panel in document["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_data_source_is_the_users_choice() -> None:
    def sources(node: Any) -> Iterator[Any]:
        if isinstance(node, dict):
            yield from [node["datasource"]] if "datasource" in node else []
            yield from (found for value in node.values() for found in sources(value))
        elif isinstance(node, list):
            yield from (found for value in node for found in sources(value))

    found = list(sources(dashboard()))
    assert len(found) > 2 * len(panels())
    assert all(source == DATASOURCE for source in found)
    variables = {each["name"]: each for each in dashboard()["templating"]["list"]}
    assert set(variables) == {"datasource", "model", "experiment"}
    assert variables["datasource"]["type"] == "datasource"
    for name in ("model", "experiment"):
        metric, label = re.fullmatch(  # type: ignore[union-attr]
            r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variables[name]["query"]["query"]
        ).groups()
        assert label == name
        assert label in known_metrics()[metric]


def test_a_chosen_model_is_the_only_one_shown() -> None:
    for panel in panels():
        for target in panel["targets"]:
            for name, labels in used(target["expr"]).items():
                assert "model" in labels or name.startswith("vllm:"), panel["title"]


@pytest.fixture
def rule(render: Render) -> Manifest:
    return one(render("everything"), "PrometheusRule")


def test_rules_of_the_chart_are_those_of_the_file(rule: Manifest, render: Render) -> None:
    assert rule["apiVersion"] == "monitoring.coreos.com/v1"
    assert rule["metadata"]["labels"]["prometheus"] == "main"
    plain = one(render("cpu", "prometheusRule.enabled=true"), "PrometheusRule")
    assert plain["spec"]["groups"] == groups()


def test_every_threshold_reaches_its_rule(rule: Manifest) -> None:
    """``everything.yaml`` has other values than the defaults."""
    changed = {
        name: (before.get("expr"), before.get("for")) != (after.get("expr"), after.get("for"))
        for of, to in zip(groups(), rule["spec"]["groups"], strict=True)
        for before, after in zip(of["rules"], to["rules"], strict=True)
        if (name := before.get("alert"))
    }
    # These have no number to choose.
    fixed = {
        "LivepruneCanaryMismatch",
        "LivepruneSwapFailed",
        "LivepruneExperimentInvalid",
        "LivepruneExperimentGuardrail",
        "LivepruneExperimentRolledBack",
        "LivepruneJobFailed",
    }
    assert {name for name, differs in changed.items() if not differs} == fixed
    by_name = {
        x["alert"]: x
        for group in rule["spec"]["groups"]
        for x in group["rules"][0:]
        if "alert" in x
    }
    assert by_name["LivepruneErrorsFast"]["expr"].count("14.4 * 0.01 #") == 2
    assert by_name["LivepruneErrorsSlow"]["expr"].count("6 * 0.01 #") == 2
    for name in ("LivepruneErrorsFast", "LivepruneErrorsSlow", "LivepruneVariantSlow"):
        assert "> 20 #" in by_name[name]["expr"]
    assert "3 # limits.slowFactor" in by_name["LivepruneVariantSlow"]["expr"]
    assert "> 0.2 #" in by_name["LivepruneDrift"]["expr"]
    assert "> 0.9 #" in by_name["LivepruneKVCachePressure"]["expr"]
    assert by_name["LivepruneDown"]["expr"].count('job=~"llm/.*"') == 2
    waits = {name: found["for"] for name, found in by_name.items() if "for" in found}
    assert waits == {
        "LivepruneDown": "1m",
        "LivepruneEngineSilent": "1m",
        "LivepruneKVCachePressure": "2m",
        "LivepruneErrorsSlow": "3m",
        "LivepruneVariantSlow": "3m",
        "LivepruneDrift": "4m",
        "LivepruneExperimentPaused": "5m",
        "LivepruneJobStuck": "6m",
    }


def test_rules_of_the_chart_are_valid(rule: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    found = promtool("check", "rules", str(path))
    assert found.returncode == 0, found.stderr


def test_dashboard_of_the_chart(render: Render) -> None:
    found = one(render("everything"), "ConfigMap")
    assert found["metadata"]["name"] == "trial-liveprune-grafana"
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert found["metadata"]["labels"]["team"] == "charts"
    assert found["metadata"]["annotations"] == {"grafana_folder": "Serving"}
    assert json.loads(found["data"]["liveprune.json"]) == dashboard()


@pytest.mark.parametrize("value", ["-1", "0", "1.5", "much"])
def test_thresholds_out_of_range_are_refused(helm: Helm, value: str) -> None:
    def template(key: str) -> subprocess.CompletedProcess[str]:
        return helm("template", "trial", str(CHART), "--set", f"model=m,{key}={value}")

    for name in ("errorBudget", "drift", "kvCacheUsage"):
        found = template(f"prometheusRule.limits.{name}")
        assert found.returncode != 0
        assert f"/prometheusRule/limits/{name}" in found.stderr


def test_fractions_on_the_command_line(helm: Helm) -> None:
    words = "model=m,prometheusRule.enabled=true,prometheusRule.limits.drift=0.25"
    found = helm("template", "trial", str(CHART), "--set", words)
    assert found.returncode == 0, found.stderr
    assert "> 0.25 # limits.drift" in found.stdout
