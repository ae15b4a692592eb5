"""NOTES.txt: what `helm install` prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from liveprune.server.admin_key import KEY_FILE, KEY_VARIABLE, STATE_VARIABLE
from tests.helm.commands import command
from tests.helm.manifests import API_KEY, CHART, OPEN, VALUES, Helm, Render, env, one, server


def notes(helm: Helm, values: Path, *settings: str) -> str:
    words = [word for setting in settings for word in ("--set", setting)]
    arguments = ["--namespace", "llm", "--values", str(values), *words]
    result = helm("install", "trial", str(CHART), "--dry-run=client", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout.partition("NOTES:")[2]


@pytest.mark.parametrize("values", VALUES)
def test_commands(helm: Helm, render: Render, values_files: dict[str, Path], values: str) -> None:
    text = notes(helm, values_files[values])
    port = one(render(values), "Service")["spec"]["ports"][0]["port"]
    assert "helm test trial --namespace llm" in text
    assert "rollout status deployment/trial-liveprune" in text
    assert f"port-forward service/trial-liveprune 8000:{port}" in text
    served = server(render(values))["args"][1] if values != "everything" else "mixtral"
    assert f'"model":"{served}"' in text
    assert ("WARNING: everyone" in text) == (values != "everything")
    assert API_KEY not in text
    if values == "everything":
        assert "get secret trial-liveprune-api-key" in text
        assert """go-template='{{index .data "the.key" | base64decode}}'""" in text


def test_generated_admin_key(helm: Helm, render: Render, values_files: dict[str, Path]) -> None:
    text = notes(helm, values_files["cpu"])
    name = one(render("cpu"), "Deployment")["metadata"]["name"]
    key = f"{env(render('cpu'))[STATE_VARIABLE]}/{KEY_FILE}"
    assert f"port-forward deployment/{name} 8001:8001\n" in text
    run = f"kubectl --namespace llm exec deployment/{name} --container server --"
    assert f"export {KEY_VARIABLE}=$({run} cat {key} | head -n 1)\n" in text
    assert f"{run} liveprune variants list\n" in text
    for word in ("state.persistence", "admin port listens"):
        assert word not in text


def test_commands_of_live_variants_exist(helm: Helm, values_files: dict[str, Path]) -> None:
    text = notes(helm, values_files["cpu"])
    lines = re.findall(r"^  liveprune ([^#\n]+)", text, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        found, rest = command(*line.split())
        found.make_context(line, rest)


def test_admin_key_of_an_existing_secret(helm: Helm, values_files: dict[str, Path]) -> None:
    text = notes(helm, values_files["everything"])
    template = """--output go-template='{{index .data "the.admin.key" | base64decode}}'"""
    assert f"export {KEY_VARIABLE}=$(kubectl --namespace llm get secret admin {template})" in text
    assert f"/{KEY_FILE}" not in text
    assert "WARNING: the admin port listens on 0.0.0.0" in text
    assert "The peers in networkPolicy.adminFrom reach it" in text


def test_warnings(helm: Helm, values_files: dict[str, Path]) -> None:
    text = notes(helm, values_files["cpu"], *OPEN, "state.persistence.enabled=false")
    assert "networkPolicy.adminFrom is empty: nobody reaches it" in text
    assert "WARNING: state.persistence.enabled is false" in text
    assert "the admin key and the audit log are lost" in text


def test_no_live_variants(helm: Helm, values_files: dict[str, Path]) -> None:
    text = notes(helm, values_files["replicas"])
    for word in ("admin", "liveprune swap", "state.persistence"):
        assert word not in text
