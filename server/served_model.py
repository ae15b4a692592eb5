"""Start ``liveprune serve`` as a child process, wait until it answers, measure it, stop it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import httpx
import psutil

from liveprune.pruning.errors import IncompatibleEnvironmentError

START_TIMEOUT = 600.0
"""Seconds; a busy machine takes minutes to import and start an engine."""
STOP_TIMEOUT = 60.0


class ServedModel:
    """One server process on a free loopback port; use it as a context manager."""

    def __init__(
        self,
        model: Path,
        *,
        log: Path,
        flags: Sequence[str] = (),
        name: str | None = None,
        state: Path | None = None,
    ) -> None:
        """Start the process; ``wait_ready`` says when it answers.

        ``state``: folder that its live variants are remembered in; None: without live variants.
        """
        self.port, self.admin_port = free_port(), free_port()
        self.name = name or str(model)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "liveprune.server", "serve", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--served-model-name", self.name, *flags]
        if state is None:
            command += ["--no-live"]
        else:
            command += ["--state-dir", str(state), "--admin-port", str(self.admin_port)]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )

    @property
    def base_url(self) -> str:
        """Root of the public HTTP API."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin_url(self) -> str:
        """Root of the admin API."""
        return f"http://127.0.0.1:{self.admin_port}"

    @property
    def running(self) -> bool:
        """The process has not ended."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the API server; engine and workers are its children."""
        return self._process.pid

    def wait_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Wait for ``/health``.

        Raises:
            IncompatibleEnvironmentError: the server ended or did not answer in time.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise IncompatibleEnvironmentError(
                    f"{self.name}: the server ended with status {self._process.returncode}; "
                    f"its log {self.log} ends:\n{self.log_tail()}"
                )
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.base_url}/health", timeout=5).is_success:
                    return
            time.sleep(0.5)
        raise IncompatibleEnvironmentError(
            f"{self.name}: no answer on {self.base_url}/health within {timeout:.0f} s; "
            f"its log {self.log} ends:\n{self.log_tail()}"
        )

    def log_tail(self, lines: int = 20) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def resident_bytes(self) -> int:
        """Memory of the server and its engine, shared pages counted in proportion (PSS)."""
        root = psutil.Process(self._process.pid)
        total = 0
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total

    def stop(self) -> int:
        """Ask the server to stop, wait, and kill what is left; return the exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment() -> dict[str, str]:
    """The caller's environment, with what a small machine needs where nothing else is said."""
    defaults = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    return {**defaults, **os.environ}
