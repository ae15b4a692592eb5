"""Threads that work beside a serving engine without slowing it."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

NICE = 10
"""Gets a tenth of what an engine's thread gets on the same core: it gives way but never starves,
and what it holds meanwhile (the interpreter's lock, a page) is not held for long."""


@contextmanager
def in_background(device: torch.device) -> Iterator[None]:
    """Make the calling thread give way to the engine's; it stays so, and must be one of its own.

    It gets a low priority, all cores that threads of this process use, no helpers in parallel
    regions, and on CUDA a stream of its own. What the operating system refuses is left as it is.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        # vLLM pins a CPU worker's first thread to one core, and threads started by it inherit that.
        with suppress(OSError):
            os.sched_setaffinity(thread, _cores())
        with suppress(OSError):
            nice = max(NICE, os.getpriority(os.PRIO_PROCESS, thread))
            os.setpriority(os.PRIO_PROCESS, thread, nice)
        _work_alone()
    # The worker may have made the rows in this mode; then they are written in no other.
    with torch.inference_mode(), _own_stream(device):
        yield


def _own_stream(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def _cores() -> set[int]:
    """Cores that any thread of this process may use: those that the user left to it."""
    cores: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # ended meanwhile
            cores |= os.sched_getaffinity(int(thread.name))
    return cores


def _work_alone() -> None:
    """Keep parallel regions of the calling thread from starting threads on the engine's cores.

    ``torch.set_num_threads`` is no way: it acts on threads to come, and vLLM's CPU worker turns it
    off.
    """
    torch.get_num_threads()  # sets the thread up; later it would undo what follows
    for set_threads in _setters():
        set_threads(1)


@functools.cache
def _setters() -> list[Callable[[int], object]]:
    """Functions that set the calling thread's number of OpenMP and of MKL threads."""
    torch_library = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    found = []
    for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
        # The process's first: a preloaded OpenMP library is the one that torch uses.
        for library in (None, str(torch_library)):
            with suppress(OSError, AttributeError):
                found.append(getattr(ctypes.CDLL(library), name))
                break
    return found
