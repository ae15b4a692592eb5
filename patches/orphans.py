"""Engines and workers end with the process that started them, also where that was killed.

vLLM's engine is told when its server stops. A server that is killed tells nobody: its engine would
hold on to the device's memory, and the next start would find none.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing import connection
from multiprocessing.process import BaseProcess

GRACE = 2.0
"""Seconds to end in an orderly way, where the parent ended so itself."""

_watching = threading.Event()


def end_with_parent() -> None:
    """Watch the parent, in a process that ``multiprocessing`` started; a second call does nothing.

    Other processes (a server, a notebook, an actor of Ray) have nobody to follow.
    """
    parent = multiprocessing.parent_process()
    if parent is None or _watching.is_set():
        return
    _watching.set()
    threading.Thread(target=_follow, args=(parent,), name="liveprune-parent", daemon=True).start()


def _follow(parent: BaseProcess) -> None:
    connection.wait([parent.sentinel])
    time.sleep(GRACE)
    # Not an exit that could wait for threads or collective calls which nobody answers any more.
    os._exit(1)
