from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from liveprune.patches import orphans

PARENT = """
import multiprocessing, sys, time
from liveprune.patches.orphans import end_with_parent

def child(ready):
    for _ in range(2):
        end_with_parent()
    ready.send(True)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    here, there = context.Pipe()
    end_with_parent()  # nobody to follow
    process = context.Process(target=child, args=(there,))
    process.start()
    here.recv()
    print(process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_child_does_not_outlive_a_killed_parent(method: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script, method], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        _, alive = psutil.wait_procs([child], timeout=orphans.GRACE + 30)
        # Nobody here reaps it.
        assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_without_a_parent_nothing_is_watched() -> None:
    orphans.end_with_parent()
    assert not orphans._watching.is_set()
