"""Writing a pruned checkpoint beside a running server: a process of low priority, killable.

The worker writes one JSON line for each step to its standard output. When nobody reads them any
more, because the server has died, it fails at the next one and removes what it has written.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.errors import CheckpointError, LiveprunError
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_io import load_plan, save_plan

NICENESS = 10
IO_PRIORITY = 7
"""The lowest of the best-effort class; the idle class may never get a turn."""


class CheckpointWorker:
    """Writes the checkpoint that a plan makes of a model, in a process of its own."""

    def __init__(self, model: Path, plan: Plan, output: Path) -> None:
        """``output``: the new folder; it appears whole, or not at all."""
        self._model = model
        self._plan = plan
        self._output = output
        self._lock = threading.Lock()
        self._killed = False
        self._process: subprocess.Popen[str] | None = None

    def run(self, progress: Callable[[int, int], None]) -> None:
        """Work to the end; ``progress`` is called on this thread with (bytes written, in all).

        Raises:
            CheckpointError: it failed or was killed; nothing is left of it.
        """
        scratch = self._output.parent / f".{self._output.name}.plan"
        try:
            save_plan(self._plan, scratch / "plan.json")
            self._run(scratch / "plan.json", progress)
        except BaseException:
            # Killed, it could not tidy up.
            for rest in self._output.parent.glob(f".{self._output.name}.*"):
                shutil.rmtree(rest, ignore_errors=True)
            raise
        shutil.rmtree(scratch, ignore_errors=True)

    def kill(self) -> None:
        """End it at once; ``run`` then raises, unless the checkpoint is complete already."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def _run(self, plan: Path, progress: Callable[[int, int], None]) -> None:
        command = [sys.executable, "-m", "liveprune.server.rebuild_worker"]
        with self._lock:
            if self._killed:
                raise CheckpointError(f"{self._output}: not written: cancelled")
            self._process = subprocess.Popen(
                [*command, str(self._model), str(plan), str(self._output)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # a Ctrl-C is the server's to answer
            )
        error = ""
        with self._process as process:
            for line in process.stdout or ():
                report: dict[str, Any] = json.loads(line)
                error = report.get("error", "")
                if not error:
                    progress(report["bytes_done"], report["bytes_total"])
        if process.returncode:
            reason = error or f"the worker ended with status {process.returncode}"
            raise CheckpointError(f"{self._output}: not written: {reason}")


def main(model: str, plan: str, output: str) -> int:
    """The worker's side."""
    os.nice(NICENESS)
    psutil.Process().ionice(psutil.IOPRIO_CLASS_BE, IO_PRIORITY)
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print belongs in the log

    def report(**fields: Any) -> None:
        reports.write(json.dumps(fields) + "\n")

    try:
        apply_plan(
            Path(model),
            load_plan(Path(plan)),
            Path(output),
            progress=lambda done, total: report(bytes_done=done, bytes_total=total),
        )
    except (LiveprunError, OSError) as error:
        with contextlib.suppress(BrokenPipeError):  # the server may be gone
            report(error=str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
