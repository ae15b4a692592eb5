"""The values of the chart: what is refused, and that each one is documented."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Helm = Callable[..., subprocess.CompletedProcess[str]]

REPOSITORY = Path(__file__).parent.parent.parent
CHART = REPOSITORY / "helm" / "liveprune"

# Settings that are refused, and words that the message must hold.
REFUSED: list[tuple[list[str], list[str]]] = [
    ([], ["model is required", "--set model="]),
    (["model=--help"], ["/model"]),
    (["model=null"], ["model"]),
    (["modle=m"], ["modle", "not allowed"]),
    (["service.prot=80"], ["/service", "prot"]),
    (["probes.startup.initialDelaySeconds=5"], ["/probes/startup", "initialDelaySeconds"]),
    (["replicas=-1"], ["/replicas", "minimum"]),
    (["replicas=two"], ["/replicas", "string", "integer"]),
    (["replicas=null"], ["replicas"]),
    (["service.port=70000"], ["/service/port", "maximum"]),
    (["service.type=Ingress"], ["/service/type", "ClusterIP"]),
    (["image.pullPolicy=Sometimes"], ["/image/pullPolicy", "IfNotPresent"]),
    (["image.digest=sha256:12"], ["/image/digest"]),
    (["strategy.type=BlueGreen"], ["/strategy/type", "Recreate"]),
    (["strategy.rollingUpdate.maxSurge=1"], ["strategy.type is", "Recreate", "RollingUpdate"]),
    (["gpu.count=-1"], ["/gpu/count", "minimum"]),
    (["cpu.ompNumThreads=many"], ["/cpu/ompNumThreads"]),
    (["persistence.size=100GB"], ["/persistence/size"]),
    (["persistence.accessModes={ReadOnlyMany}"], ["/persistence/accessModes", "ReadWriteMany"]),
    (
        ["persistence.enabled=false", "persistence.existingClaim=c"],
        ["persistence.enabled is false"],
    ),
    (["replicas=2"], ["replicas is 2", "live.enabled is true", "live.enabled false"]),
    (["live.enabled=false", "live.variants.e4k1=/p"], ["live.variants is set", "false"]),
    (["live.enabled=false", "live.resident=e4k1"], ["live.resident is set", "false"]),
    (["live.variants.full=/p"], ["live.variants", '"full"', "base model"]),
    (["live.variants.a:b=/p"], ["/live/variants", "a:b", "not allowed"]),
    (["live.variants.a=plans/a.json"], ["/live/variants/a", "plans/a.json"]),
    (["live.resident=a:b"], ["/live/resident"]),
    (["live.memoryTarget=40 gigabytes"], ["/live/memoryTarget"]),
    (["live.spareRows=-1"], ["/live/spareRows", "minimum"]),
    (["live.spareRows=few"], ["/live/spareRows"]),
    (["live.maxVariants=257"], ["/live/maxVariants", "maximum"]),
    (["live.planRoots={/}"], ["/live/planRoots/0"]),
    (["live.stateDir=/x"], ["/live", "stateDir", "not allowed"]),
    (["state.enabled=false"], ["/state", "enabled", "not allowed"]),
    (["state.persistence.size=1GB"], ["/state/persistence/size"]),
    (
        ["state.persistence.enabled=false", "state.persistence.existingClaim=c"],
        ["state.persistence.existingClaim is", "state.persistence.enabled is false"],
    ),
    (["strategy.type=RollingUpdate"], ["maxSurge is 25%", "expected 0", "Recreate"]),
    (
        ["strategy.type=RollingUpdate", "strategy.rollingUpdate.maxSurge=1"],
        ["maxSurge is 1:", "expected 0"],
    ),
    (
        ["podSecurityContext.fsGroupChangePolicy=Always"],
        ["fsGroupChangePolicy is", "Always", "OnRootMismatch", "admin.existingSecret"],
    ),
    (["podSecurityContext.fsGroupChangePolicy=null"], ["fsGroupChangePolicy is", "Always"]),
    (["admin.host=10.0.0.1"], ["/admin/host", "127.0.0.1"]),
    (["admin.port=9"], ["/admin", "port", "not allowed"]),
    (["admin.host=0.0.0.0"], ["admin.host is", "networkPolicy.enabled"]),
    (
        ["admin.host=0.0.0.0", "networkPolicy.enabled=true", "live.enabled=false"],
        ["admin.host is", "live.enabled"],
    ),
    (
        ["networkPolicy.enabled=true", "networkPolicy.adminFrom[0].podSelector.matchLabels.a=b"],
        ["networkPolicy.adminFrom is set", "admin.host is"],
    ),
    (
        ["admin.existingSecret=s", "apiKey.existingSecret=s", "admin.key=k", "apiKey.key=k"],
        ["admin.existingSecret and apiKey.existingSecret", "another key"],
    ),
    (["extraArgs={--no-live}"], ["--no-live", "live.enabled"]),
    (["extraArgs={--state-dir=/x}"], ["--state-dir", "state.persistence"]),
    (["extraEnv[0].name=LIVEPRUNE_ADMIN_KEY"], ["LIVEPRUNE_ADMIN_KEY", "admin.existingSecret"]),
    (["extraEnv[0].name=LIVEPRUNE_STATE_DIR"], ["LIVEPRUNE_STATE_DIR is set by the chart"]),
    (["podAnnotations.a=1"], ["/podAnnotations/a", "string"]),
    (["shutdown.exitSeconds=0"], ["/shutdown/exitSeconds", "minimum"]),
    (["podDisruptionBudget.maxUnavailable=half"], ["/podDisruptionBudget/maxUnavailable"]),
    (["serviceMonitor.interval=often"], ["/serviceMonitor/interval"]),
    (["prometheusRule.waits.down=soon"], ["/prometheusRule/waits/down"]),
    (["prometheusRule.limits.speed=2"], ["/prometheusRule/limits", "speed", "not allowed"]),
    (["prometheusRule.limits.slowFactor=0.5"], ["/prometheusRule/limits/slowFactor"]),
    (['prometheusRule.job=a"b'], ["/prometheusRule/job"]),
    (["grafanaDashboard.labels.a=1"], ["/grafanaDashboard/labels/a", "string"]),
    (["extraArgs={--max-model-len 8192}"], ["two words", "--flag=value"]),
    (["extraArgs={--api-key,x}"], ["--api-key", "apiKey.existingSecret"]),
    (["extraArgs={--api_key=x}"], ["--api-key", "apiKey.existingSecret"]),
    (["extraArgs={--port=1}"], ["--port", "service.port"]),
    (["extraArgs={--shutdown-timeout=9}"], ["--shutdown-timeout", "shutdown.drainSeconds"]),
    (["extraEnv[0].name=VLLM_API_KEY"], ["VLLM_API_KEY", "apiKey.existingSecret"]),
    (["extraEnv[0].name=HOME"], ["HOME is set by the chart"]),
    (["extraEnv[0].name=A", "extraEnv[1].name=A"], ["A is named twice"]),
    (["extraEnv[0].value=1"], ["/extraEnv/0", "name"]),
    (["store.existingSecret=s"], ["store.existingClaim", "both or neither"]),
    (["store.existingClaim=c"], ["store.existingSecret", "both or neither"]),
    (["store.replica=one"], ["store.replica", "without store.existingSecret"]),
    (["store.quota=much"], ["/store/quota"]),
    (["extraArgs={--store=postgresql://x}"], ["--store", "store.existingSecret"]),
]


def template(helm: Helm, *settings: str) -> subprocess.CompletedProcess[str]:
    words = [word for setting in settings for word in ("--set", setting)]
    return helm("template", "trial", str(CHART), *words)


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the path of each value that is not itself a non-empty mapping."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def properties(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yield the path of each leaf property that a closed schema names."""
    for key, property_ in schema.items():
        name = property_.get("$ref", "").removeprefix("#/definitions/")
        child = definitions.get(name, property_)
        if "properties" in child:
            yield from properties(child["properties"], definitions, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_refused(helm: Helm, settings: list[str], words: list[str]) -> None:
    needs_model = settings and not settings[0].startswith("model=")
    result = template(helm, *(["model=m"] if needs_model else []), *settings)
    assert result.returncode != 0
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr


def test_model_is_the_only_required_value(helm: Helm) -> None:
    assert template(helm, "model=m").returncode == 0


def test_two_sources_of_the_api_key_are_refused(helm: Helm) -> None:
    key = "correct-horse-battery"
    result = template(helm, "model=m", f"apiKey.value={key}", "apiKey.existingSecret=s")
    assert result.returncode != 0
    assert "apiKey.value and apiKey.existingSecret are both set" in result.stderr
    assert key not in result.stderr


def test_a_short_api_key_is_refused_and_not_printed(helm: Helm) -> None:
    result = template(helm, "model=m", "apiKey.value=hunter2")
    assert result.returncode != 0
    assert "/apiKey/value" in result.stderr
    assert "16" in result.stderr
    assert "hunter2" not in result.stderr


def test_schema_accepts_the_globals_of_a_parent_chart(helm: Helm) -> None:
    assert template(helm, "model=m", "global.region=x").returncode == 0


def test_schema_and_values_name_the_same_things() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    named = set(properties(schema["properties"], schema["definitions"], ""))
    # Free-form mappings with a default are one property of the schema and several leaves.
    free = {"podSecurityContext", "securityContext"}
    # Without a default: these two appear only where a user writes them.
    optional = {
        "global",
        "strategy.rollingUpdate.maxSurge",
        "strategy.rollingUpdate.maxUnavailable",
    }
    optional |= {"resources.requests", "resources.limits", "resources.claims"}
    flat = {
        path if path.split(".")[0] not in free else path.split(".")[0] for path in leaves(values)
    }
    assert named - optional == flat - {"strategy.rollingUpdate", "resources"}


def test_readme_table_is_complete() -> None:
    readme = (CHART / "README.md").read_text()
    for path in leaves(yaml.safe_load((CHART / "values.yaml").read_text())):
        parents = path.split(".")
        ancestors = (".".join(parents[:depth]) for depth in range(1, len(parents) + 1))
        assert any(f"\n| `{name}` | " in readme for name in ancestors), path


def test_readme_table_is_up_to_date() -> None:
    script = [sys.executable, str(REPOSITORY / "scripts" / "chart_readme.py"), "--check"]
    result = subprocess.run(script, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_app_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == project["version"]
