"""Real helm for the tests of the chart, and its output parsed, each rendering made once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent.parent
CHART = REPOSITORY / "helm" / "liveprune"


class UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader keeps the last of two equal keys in silence; Kubernetes refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {key for key in keys if keys.count(key) > 1}
        assert not repeated, f"line {node.start_mark.line + 1}: keys named twice: {repeated}"
        return super().construct_mapping(node, deep)


@pytest.fixture(scope="session")
def helm() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs helm with some arguments and returns what came of it.

    The binary is LIVEPRUNE_HELM, or what scripts/get_helm.py finds or fetches.
    """
    binary = os.environ.get("LIVEPRUNE_HELM")
    if binary is None:
        script = [sys.executable, str(REPOSITORY / "scripts" / "get_helm.py")]
        found = subprocess.run(script, check=False, capture_output=True, text=True)
        if found.returncode != 0:
            reason = f"no helm: {found.stderr.strip().splitlines()[-1]}"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        binary = found.stdout.strip()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        # A cluster that the user's kubeconfig names is no business of a test.
        environment = os.environ | {"KUBECONFIG": os.devnull}
        command = [binary, *arguments]
        return subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment, timeout=60
        )

    return run


@pytest.fixture(scope="session")
def values_files() -> dict[str, Path]:
    """Return the values files that the chart is rendered with, by a short name."""
    return {
        "cpu": CHART / "values-cpu.yaml",
        "gpu": CHART / "values-gpu.yaml",
        "everything": Path(__file__).parent / "everything.yaml",
        "replicas": Path(__file__).parent / "replicas.yaml",
    }


@pytest.fixture(scope="session")
def render(
    helm: Callable[..., subprocess.CompletedProcess[str]],
    values_files: dict[str, Path],
) -> Callable[..., list[dict[str, Any]]]:
    """Return a function: short name of a values file, then `--set` words, to the manifests.

    The manifests are shared between tests: do not change them.
    """

    @cache
    def manifests(values: str, *settings: str) -> list[dict[str, Any]]:
        arguments = ["template", "trial", str(CHART), "--namespace", "llm"]
        arguments += ["--values", str(values_files[values])]
        arguments += [word for setting in settings for word in ("--set", setting)]
        result = helm(*arguments)
        assert result.returncode == 0, result.stderr
        return list(yaml.load_all(result.stdout, UniqueKeyLoader))

    return manifests
