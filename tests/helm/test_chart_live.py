"""Live variants in the chart: flags, state folder, admin API."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperOption

from liveprune.pruning.errors import VariantError
from liveprune.server.admin_key import KEY_VARIABLE, STATE_VARIABLE, STORE_VARIABLE
from liveprune.server.live_options import parse_bytes
from liveprune.server.variant import check_tag
from tests.helm.commands import command
from tests.helm.manifests import (
    CHART,
    OPEN,
    VALUES,
    Helm,
    Render,
    claims,
    env,
    one,
    pod,
    server,
    volumes,
)

ADMIN_PORT = 8001
PASSED_ON = {
    "--help",
    # Mounted files, such as keys that can be rotated without a restart.
    "--admin-key-file",
    "--canary-prompts",
    # Experiments, statistics, kept prompts and jobs: settings of the server alone.
    "--experiment-interval",
    "--keep-jobs",
    "--keep-prompts",
    "--keep-prompts-days",
    "--keep-prompts-max",
    "--live-statistics",
    "--no-live-statistics",
    "--redact",
    "--statistics-every",
    "--statistics-half-life",
    "--statistics-interval",
    "--statistics-sample",
}
"""Flags that the chart leaves to ``extraArgs``."""


def parsed(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What `liveprune serve` understands of ARGUMENTS, and what it leaves to vLLM."""
    serve, words = command(*arguments)
    context = serve.make_context("serve", words)
    return context.params, context.args


def live_schema() -> dict[str, Any]:
    schema = json.loads((CHART / "values.schema.json").read_text())
    properties: dict[str, Any] = schema["properties"]["live"]["properties"]
    return properties


@pytest.fixture(autouse=True)
def no_settings_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STATE_VARIABLE, raising=False)


def test_default_flags(render: Render) -> None:
    assert server(render("gpu"))["args"] == [
        "serve",
        "Qwen/Qwen3-30B-A3B",
        "--host=0.0.0.0",
        "--port=8000",
        "--shutdown-timeout=60",
        "--admin-host=127.0.0.1",
        "--admin-port=8001",
        "--max-model-len=16384",
    ]


def test_the_server_understands_every_flag(render: Render) -> None:
    options, vllm = parsed(server(render("everything"))["args"])
    assert options["live"] is True
    assert options["variant"] == ["4.x=/data/plans/4 x", "e4k1=/plans/e4k1.json"]
    assert options["resident"] == "e4k1"
    assert parse_bytes("--memory-target", options["memory_target"]) == 40.5 * 2**30
    assert options["spare_rows"] == 0
    assert options["max_variants"] == 4
    assert options["plan_root"] == [Path("/plans"), Path("/data/plans")]
    assert (options["admin_host"], options["admin_port"]) == ("0.0.0.0", ADMIN_PORT)  # noqa: S104
    assert (options["store_files"], options["replica"]) == (Path("/store"), "first")
    assert parse_bytes("--store-quota", options["store_quota"]) == 5 * 2**30
    assert vllm == [
        "--host=0.0.0.0",
        "--port=8000",
        "--shutdown-timeout=600",
        "--served-model-name=mixtral",
        "--max-model-len=4096",
        "--enforce-eager",
    ]


def test_flags_that_are_not_given_are_left_to_the_server(render: Render) -> None:
    ours, _ = parsed(server(render("cpu"))["args"])
    defaults, _ = parsed(["serve", ours["model"]])
    assert ours == defaults


def test_a_database_that_releases_share(render: Render) -> None:
    manifests = render("everything")
    (variable,) = (x for x in server(manifests)["env"] if x["name"] == STORE_VARIABLE)
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "database", "key": "the.url"}
    claimed = volumes(manifests)["/store"]
    assert claimed["persistentVolumeClaim"] == {"claimName": "shared"}
    assert "/store" in {x["mountPath"] for x in server(manifests)["volumeMounts"]}


def test_live_variants_off(render: Render) -> None:
    manifests = render("replicas")
    options, vllm = parsed(server(manifests)["args"])
    assert options["live"] is False
    assert vllm == ["--host=0.0.0.0", "--port=8000", "--shutdown-timeout=60"]
    assert "--admin" not in json.dumps(manifests)
    assert STATE_VARIABLE not in env(manifests)
    assert "/state" not in volumes(manifests)
    assert claims(manifests).keys() == {"trial-liveprune"}
    assert one(manifests, "Deployment")["spec"]["replicas"] == 3


def test_numbers_of_a_values_file_are_rendered_as_they_are(
    helm: Helm, values_files: dict[str, Path], tmp_path: Path
) -> None:
    # Those of a file are floats to helm; a million of them would otherwise read 1e+06.
    extra = tmp_path / "values.yaml"
    extra.write_text("live: {spareRows: 1000000, maxVariants: 256}\n")
    files = ["--values", str(values_files["cpu"]), "--values", str(extra)]
    result = helm("template", "trial", str(CHART), *files)
    assert result.returncode == 0, result.stderr
    assert "- --spare-rows=1000000\n" in result.stdout
    assert "- --max-variants=256\n" in result.stdout


def test_extra_args_refuse_the_flags_that_have_values(helm: Helm) -> None:
    flags = {
        flag
        for parameter in command("serve")[0].params
        if isinstance(parameter, TyperOption)
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    for flag in sorted(flags - PASSED_ON):
        result = helm(
            "template", "trial", str(CHART), "--set", f"model=m,extraArgs[0]={flag}=somewhere"
        )
        assert f"extraArgs: {flag} is set by the chart" in result.stderr, flag


@pytest.mark.parametrize(
    "text",
    ["40GiB", "40Gi", "40G", "40GB", "1.5TiB", "8000000000", "1k", "40 PiB", "40Pi", "GiB", "-1G"],
)
def test_memory_targets_are_those_of_the_server(text: str) -> None:
    accepted = False
    with contextlib.suppress(VariantError):
        accepted = parse_bytes("--memory-target", text) > 0
    assert (re.search(live_schema()["memoryTarget"]["pattern"], text) is not None) == accepted


@pytest.mark.parametrize("tag", ["e4k1", "4.x", "A_b-c", ".x", "-x", "a b", "a=b", "a:b", ""])
def test_tags_are_those_of_the_server(tag: str) -> None:
    accepted = False
    with contextlib.suppress(VariantError):
        check_tag(tag)
        accepted = True
    (pattern,) = live_schema()["variants"]["patternProperties"]
    assert (re.search(pattern, tag) is not None) == accepted
    # Empty: no such flag.
    assert (re.search(live_schema()["resident"]["pattern"], tag) is not None) == (
        accepted or tag == ""
    )


@pytest.mark.parametrize("settings", [(), ("state.persistence.enabled=false",)])
@pytest.mark.parametrize("values", ["cpu", "gpu", "everything"])
def test_the_state_folder_can_be_written(
    render: Render, values: str, settings: tuple[str, ...]
) -> None:
    manifests = render(values, *settings)
    assert server(manifests)["securityContext"]["readOnlyRootFilesystem"] is True
    state = env(manifests)[STATE_VARIABLE]
    (mount,) = (m for m in server(manifests)["volumeMounts"] if m["mountPath"] == state)
    assert "readOnly" not in mount
    claim = {"persistentVolumeClaim": {"claimName": "trial-liveprune-state"}}
    assert volumes(manifests)[state] == ({"emptyDir": {}} if settings else claim)
    # The folder is the group's: the server runs in that group. OnRootMismatch leaves the mode of
    # the admin key alone.
    context = pod(manifests)["spec"]["securityContext"]
    assert context["fsGroup"] == context["runAsGroup"]
    assert context["fsGroupChangePolicy"] == "OnRootMismatch"


def test_state_claim(render: Render) -> None:
    claim = claims(render("everything"))["trial-liveprune-state"]
    assert claim["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "safe",
        "resources": {"requests": {"storage": "2Gi"}},
    }
    keep = {"helm.sh/resource-policy": "keep"}
    assert claim["metadata"]["annotations"] == {"team": "state"} | keep
    usual = claims(render("cpu", "persistence.retain=false"))["trial-liveprune-state"]
    assert usual["metadata"]["annotations"] == keep
    assert usual["spec"]["resources"] == {"requests": {"storage": "1Gi"}}
    deleted = claims(render("cpu", "state.persistence.retain=false"))["trial-liveprune-state"]
    assert "annotations" not in deleted["metadata"]


def test_existing_state_claim(render: Render) -> None:
    manifests = render("cpu", "state.persistence.existingClaim=mine")
    assert volumes(manifests)["/state"] == {"persistentVolumeClaim": {"claimName": "mine"}}
    assert claims(manifests).keys() == {"trial-liveprune"}


def test_no_state_claim(render: Render) -> None:
    manifests = render("cpu", "state.persistence.enabled=false")
    assert claims(manifests).keys() == {"trial-liveprune"}


def test_admin_key_of_an_existing_secret(render: Render) -> None:
    manifests = render("cpu", "admin.existingSecret=mine")
    sources = {item["name"]: item.get("valueFrom") for item in server(manifests)["env"]}
    assert sources[KEY_VARIABLE] == {"secretKeyRef": {"name": "mine", "key": "admin-key"}}
    assert KEY_VARIABLE not in env(render("cpu"))


def test_only_the_server_gets_the_admin_key(render: Render) -> None:
    manifests = render("everything")
    assert env(manifests).keys() >= {KEY_VARIABLE}
    others = [manifest for manifest in manifests if manifest["kind"] != "Deployment"]
    assert KEY_VARIABLE not in json.dumps(others)


@pytest.mark.parametrize(
    ("values", "settings"), [*((values, ()) for values in VALUES), ("cpu", OPEN)]
)
def test_the_admin_port_is_not_in_the_service(
    render: Render, values: str, settings: tuple[str, ...]
) -> None:
    manifests = render(values, *settings)
    (port,) = one(manifests, "Service")["spec"]["ports"]
    assert (port["name"], port["targetPort"]) == ("http", "http")
    (http, *admin) = server(manifests)["ports"]
    assert (http["name"], http["containerPort"]) == ("http", 8000)
    admin_port = {"name": "admin", "containerPort": ADMIN_PORT, "protocol": "TCP"}
    is_open = values == "everything" or settings == OPEN
    assert admin == ([admin_port] if is_open else [])


def test_the_network_policy_closes_the_admin_port(render: Render) -> None:
    for settings in (OPEN, OPEN[1:]):
        (rule,) = one(render("cpu", *settings), "NetworkPolicy")["spec"]["ingress"]
        assert rule["ports"] == [{"port": "http", "protocol": "TCP"}]


def test_the_network_policy_opens_the_admin_port_to_its_own_peers(render: Render) -> None:
    manifests = render("everything")
    http, admin = one(manifests, "NetworkPolicy")["spec"]["ingress"]
    operations = {"podSelector": {"matchLabels": {"team": "operations"}}}
    assert admin == {"ports": [{"port": "admin", "protocol": "TCP"}], "from": [operations]}
    assert operations not in http["from"]


@pytest.mark.parametrize(
    "settings",
    [
        # Each pod of its own state: a second one need not wait for the first.
        ("strategy.type=RollingUpdate", "state.persistence.enabled=false"),
        ("strategy.type=RollingUpdate", "strategy.rollingUpdate.maxSurge=0"),
        ("strategy.type=RollingUpdate", "strategy.rollingUpdate.maxSurge=0%"),
        ("replicas=0",),
        # No generated key whose mode would be changed.
        ("podSecurityContext.fsGroupChangePolicy=Always", "admin.existingSecret=mine"),
        ("podSecurityContext.fsGroupChangePolicy=null", "state.persistence.enabled=false"),
        ("admin.existingSecret=same", "apiKey.existingSecret=same"),
        ("live.variants=null",),
    ],
)
def test_accepted(render: Render, settings: tuple[str, ...]) -> None:
    assert one(render("cpu", *settings), "Deployment")
