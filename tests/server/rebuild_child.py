"""A stand-in for ``liveprune serve`` that restarts itself; ``test_rebuild_restart`` runs it.

It swaps to the variant ``small`` at its first start; FATE says what becomes of that. Each start
adds a JSON line to LOG: process id, checkpoint, whether it is an attempt.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from liveprune.server.operations import Operation, State
from liveprune.server.rebuild_restart import restarting
from liveprune.server.rebuild_state import RebuildFolder


def main(state: str, base: str, log: str, fate: str) -> None:
    folder = RebuildFolder(Path(state), Path(base))
    with restarting(folder, least_limit=1.0 if fate == "hang" else 600.0) as model:
        start = {"pid": os.getpid(), "model": model.name, "attempt": folder.state.attempt}
        with Path(log).open("a") as file:
            file.write(json.dumps({**start, "variable": os.environ.get("A_VARIABLE")}) + "\n")
        os.environ["A_VARIABLE"] = "changed"  # as vLLM does
        if folder.state.attempt:
            attempt(fate, Path(log))
        folder.answering.set()
        folder.update(lambda now: now.answered(0.0))
        if fate == "killed-after-answer" and folder.state.serving == "small":
            kill()
        if folder.state.operation is None and fate != "no-swap":
            operation = Operation("swap", "m:small", state=State.SWITCHING)
            folder.update(lambda now: now.switching("small", operation, "a-key"))
            if fate == "killed-before-restart":
                kill()
            if fate == "error-while-stopping":
                raise RuntimeError("a server process died")
            if fate == "exit-while-stopping":
                raise SystemExit
            if fate == "interrupted-while-stopping":
                raise KeyboardInterrupt


def attempt(fate: str, log: Path) -> None:
    """What becomes of the start with ``small``."""
    if fate == "killed-before-answer":
        kill()
    if fate == "error":
        raise RuntimeError("no room\non this device")
    if fate == "bad-exit":
        raise SystemExit(3)
    if fate == "stopped":
        raise SystemExit(0)
    if fate == "hang":
        with subprocess.Popen(["sleep", "600"]) as engine:
            (log.parent / "engine").write_text(str(engine.pid))
            time.sleep(600)


def kill() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL returned")


if __name__ == "__main__":
    main(*sys.argv[1:])
