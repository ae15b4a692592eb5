"""Connecting: a cluster of our own ends with us, a running one does not; nobody there is said."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from liveprune.pruning.demo import model_path
from liveprune.pruning.errors import IncompatibleEnvironmentError
from liveprune.server import ray_cluster as clusters
from liveprune.server.engine_description import EngineDescription
from liveprune.server.ray_cluster import ray_cluster
from liveprune.server.ray_pool import ray_pool


def children() -> set[int]:
    return {x.pid for x in psutil.Process().children(recursive=True)}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture
def head() -> Iterator[str]:
    """Address of a cluster that somebody else has started."""
    # Ray's sockets lie in there: a path of pytest's would be too long for them.
    folder = tempfile.mkdtemp(prefix="ray")
    port = free_port()
    command = [
        *(Path(sys.executable).with_name("ray"), "start", "--head", "--block"),
        *(f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2", "--include-dashboard=false"),
        *("--disable-usage-stats", f"--object-store-memory={1 << 28}"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    with process.stdout as lines:
        said = []
        for line in lines:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("".join(said))
        yield f"127.0.0.1:{port}"
        process.terminate()
        process.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_of_our_own_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")  # is not asked
    before = children()
    with ray_cluster(None, actors=3):
        assert ray.cluster_resources()["CPU"] == 3
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        started = children() - before
        assert started
        with ray_cluster("192.0.2.1:6379"):  # there is a connection: it is used
            pass
        assert ray.is_initialized()
    assert not ray.is_initialized()
    psutil.wait_procs([psutil.Process(x) for x in started if psutil.pid_exists(x)], timeout=60)
    assert not children() & started


def test_a_running_cluster_is_used_and_left_running(head: str) -> None:
    described = EngineDescription("transformers", model_path(), "float32", longest=64)
    for _ in range(2):
        with ray_pool(described, 2, head) as pool:
            actors = [psutil.Process(process.pid) for process in pool.processes]
            assert len(pool.generate([None], [(1, 5)], max_tokens=2, end=())[0][0]) == 2
        assert not ray.is_initialized()
        psutil.wait_procs(actors, timeout=60)
        assert not any(actor.is_running() for actor in actors)
    with ray_cluster(head):
        assert ray.cluster_resources()["CPU"] == 2


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(IncompatibleEnvironmentError, match=r"pip install 'liveprune\[ray\]'"),
        ray_cluster(None),
    ):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "--ray-address: cannot connect to 'nonsense': .*Invalid address format"),
        ("ray://127.0.0.1:10001", "found 'ray://127.0.0.1:10001', expected HOST:PORT"),
    ],
)
def test_what_is_no_address_is_refused(address: str, message: str) -> None:
    with pytest.raises(IncompatibleEnvironmentError, match=message), ray_cluster(address):
        pass


def test_nobody_at_the_address_is_said_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "CONNECT_SECONDS", 5.0)
    address = f"127.0.0.1:{free_port()}"
    with (
        pytest.raises(
            IncompatibleEnvironmentError, match=f"found no Ray cluster at '{address}' in 5 s"
        ),
        ray_cluster(address),
    ):
        pass
    assert not ray.is_initialized()
