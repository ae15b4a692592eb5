from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from liveprune.server import doctor
from liveprune.server.cli import app
from liveprune.server.doctor import Finding


def test_this_environment_has_no_errors() -> None:
    # In a process of its own: importing vLLM warns, and warnings are errors here.
    command = [sys.executable, "-m", "liveprune.server", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    findings = json.loads(done.stdout)
    assert [f for f in findings if f["status"] == "error"] == []
    assert len(findings) == len(doctor.CHECKS)
    assert done.returncode == 0


def test_a_missing_vllm_distribution_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    finding = doctor.check_vllm_version()
    assert finding.status == "error"
    assert "metadata wheel" in finding.found
    assert "make setup" in finding.mend


def test_another_vllm_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda _: "0.33.1")
    assert doctor.check_vllm_version() == Finding(
        "vllm", "error", "0.33.1", "Install vllm==0.32.*."
    )


def test_a_broken_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str) -> Any:
        return object() if name == "torchvision" else found(name)

    def import_module(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    finding = doctor.check_torchvision()
    assert finding.status == "error"
    assert "torchvision::nms" in finding.found
    assert "Uninstall torchvision" in finding.mend


def test_a_missing_or_switched_off_plugin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert doctor.check_plugin().status == "error"
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: [])
    finding = doctor.check_plugin()
    assert finding.status == "error"
    assert "Install Liveprune" in finding.mend


def test_thread_settings_on_a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_is_cpu_build", lambda: True)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert doctor.check_threads().status == "warning"
    assert "OMP_NUM_THREADS=1" in doctor.check_threads().mend
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor.check_threads().status == "ok"


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_broken() -> Finding:
        raise OSError("disk on fire")

    monkeypatch.setattr(doctor, "CHECKS", (check_broken,))
    assert doctor.diagnose() == [Finding("broken", "error", "OSError: disk on fire")]


def test_the_command_prints_json_and_its_status_says_whether_there_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finding = Finding("x", "error", "found", "mend")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: finding,))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout) == [vars(finding)]


def test_ray_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_ray() == Finding("ray", "ok", importlib.metadata.version("ray"))

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    finding = doctor.check_ray()
    assert finding.status == "ok"
    assert "pip install 'liveprune[ray]'" in finding.found
