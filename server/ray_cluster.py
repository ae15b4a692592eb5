"""The Ray cluster that actors run in: one of this machine's own, or a running one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from liveprune.pruning.errors import IncompatibleEnvironmentError

CONNECT_SECONDS = 60.0
"""After which a cluster that does not answer is not there."""
OBJECT_STORE_BYTES = 1 << 29
"""Of a cluster of our own: rows and scores pass through it, no weights."""
_QUIET = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
_CONNECT = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False)"


def import_ray() -> Any:
    """The module ``ray``, which then reports nothing to its makers.

    Raises:
        IncompatibleEnvironmentError: it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray warns that it will do this by default one day: actors without a GPU of their own leave
    # CUDA_VISIBLE_DEVICES alone. Ours compute on the CPU by their own choice.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise IncompatibleEnvironmentError(
            "--actors: found no Ray, expected it: pip install 'liveprune[ray]'"
        ) from error
    return ray


@contextmanager
def ray_cluster(address: str | None, actors: int = 1) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine that ends with the block.

    A connection that this process has already is used, and left as it is.

    Args:
        address: ``HOST:PORT`` of a cluster's head, or ``auto`` on one of its machines; None
            starts one.
        actors: that one of our own has room for.

    Raises:
        IncompatibleEnvironmentError: Ray is not installed or did not start, or nothing that it
            can work with answers at the address.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    if address is not None:
        _check(address)
    try:
        ray.init(
            # "local", or the variable RAY_ADDRESS would choose for us.
            address=address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            **({} if address else {"num_cpus": actors, **_QUIET}),
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = address or "on this machine"
        raise IncompatibleEnvironmentError(f"Ray, {where}: did not start: {error}") from error
    try:
        yield
    finally:
        # Ends processes only if they are those of a cluster of our own.
        ray.shutdown()


def _check(address: str) -> None:
    """Connect in a process of its own: Ray ends the one that finds nobody, after minutes."""
    if address.startswith("ray://"):
        raise IncompatibleEnvironmentError(
            f"--ray-address: found {address!r}, expected HOST:PORT of the cluster's head or auto, "
            f"on one of the cluster's machines: a search outlives a Ray client's connection"
        )
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CONNECT, address],
            capture_output=True,
            text=True,
            check=False,
            timeout=CONNECT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise IncompatibleEnvironmentError(
            f"--ray-address: found no Ray cluster at {address!r} in {CONNECT_SECONDS:.0f} s, "
            f"expected HOST:PORT of its head, reachable from here, or auto"
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise IncompatibleEnvironmentError(
            f"--ray-address: cannot connect to {address!r}: {lines[-1]}"
        )
