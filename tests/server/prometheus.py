"""Debian's Prometheus and promtool for tests, which are skipped where they are not installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

T = TypeVar("T")
SECONDS = 60.0
"""For a look that has to come true; under the five minutes that Prometheus looks back."""


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: scripts/get_prometheus installs it")
    return found


def promtool(*words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [program("promtool"), *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, input=given)


class Prometheus:
    """A running one."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def api(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=parameters)
        return answer.raise_for_status().json()["data"]

    def query(self, promql: str, label: str) -> dict[str, float]:
        """Value of each series, by a label."""
        result = self.api("query", query=promql)["result"]
        return {x["metric"].get(label, ""): float(x["value"][1]) for x in result}


def until(look: Callable[[], T], holds: Callable[[T], bool]) -> T:
    """The first look that holds, or the last one of a while."""
    deadline = time.monotonic() + SECONDS
    while not holds(found := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@contextmanager
def running(folder: Path, target: str, rules: Path) -> Iterator[Prometheus]:
    """One that scrapes ``target`` (host:port), as the job ``trial-liveprune``, all the time."""
    config = {
        "global": {"scrape_interval": "200ms", "evaluation_interval": "200ms"},
        "scrape_configs": [
            {"job_name": "trial-liveprune", "static_configs": [{"targets": [target]}]}
        ],
        "rule_files": [str(rules)],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    log = folder / "prometheus.log"
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    with log.open("w") as out, subprocess.Popen(command, stderr=out, stdout=out) as process:
        try:
            told = re.compile(r'"Listening on" address=(\S+)[\s\S]*Server is ready')
            found = until(
                lambda: told.search(log.read_text()),
                lambda match: match is not None or process.poll() is not None,
            )
            assert found is not None, log.read_text()
            url = f"http://{found[1]}"
            with httpx.Client(base_url=url, trust_env=False, timeout=SECONDS) as client:
                yield Prometheus(client)
        finally:
            process.kill()
