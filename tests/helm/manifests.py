"""Parts of the manifests that the chart renders."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Manifest = dict[str, Any]
Render = Callable[..., list[Manifest]]
Helm = Callable[..., subprocess.CompletedProcess[str]]

CHART = Path(__file__).parent.parent.parent / "helm" / "liveprune"
VALUES = ["cpu", "gpu", "everything", "replicas"]
"""Short names of the values files that conftest.py knows."""
API_KEY = "correct-horse-battery"
"""That of everything.yaml."""
OPEN = ("admin.host=0.0.0.0", "networkPolicy.enabled=true")
"""Settings that let the admin port out of the pod."""


def one(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def claims(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Return the claims that the chart makes, by name."""
    kind = "PersistentVolumeClaim"
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] == kind}


def pod(manifests: list[Manifest]) -> Manifest:
    template: Manifest = one(manifests, "Deployment")["spec"]["template"]
    return template


def server(manifests: list[Manifest]) -> Manifest:
    (container,) = pod(manifests)["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def env(manifests: list[Manifest]) -> dict[str, Any]:
    return {item["name"]: item.get("value") for item in server(manifests)["env"]}


def volumes(manifests: list[Manifest]) -> dict[str, Any]:
    """Return the volumes of the server pod by the path where they are mounted."""
    by_name = {volume["name"]: volume for volume in pod(manifests)["spec"]["volumes"]}
    return {
        mount["mountPath"]: {k: v for k, v in by_name[mount["name"]].items() if k != "name"}
        for mount in server(manifests)["volumeMounts"]
    }
