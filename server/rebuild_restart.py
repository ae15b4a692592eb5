"""One process that serves one checkpoint after the other: it executes its own command line anew.

``restarting`` wraps the server's run. A swap in rebuild mode stops the server; then the process
becomes a new one, with the same id, arguments and environment, which starts with the wanted
checkpoint. If that does not answer, by error or for too long, the process starts once more, with
the checkpoint that answered last. If the process is killed, whoever starts it again gets that, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

from liveprune.pruning.errors import CheckpointError
from liveprune.server.rebuild_state import RebuildFolder, RebuildState

VARIABLE = "LIVEPRUNE_RESTARTED"
"""Tells a process that it was restarted for a swap: the id of the operation."""
LEAST_START_LIMIT = 1800.0
"""Seconds that a start with another checkpoint may take at least: kernels may be compiled."""
START_FACTOR = 4
"""It may also take so many times as long as the last start that answered."""
END_SECONDS = 5.0
"""For what the server leaves running to end by itself."""

logger = logging.getLogger("liveprune.rebuild")


@dataclass(frozen=True)
class Command:
    """How this process was started."""

    program: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    @classmethod
    def of_this_process(cls) -> Command:
        """Ask before vLLM runs: it changes the environment for its children."""
        environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
        # Not the first of orig_argv: a bare name would be looked up, and found elsewhere.
        return cls(sys.executable, (sys.executable, *sys.orig_argv[1:]), environment)

    def run(self, operation: str) -> NoReturn:
        """Become a new process with this command line, restarted for ``operation``.

        Raises:
            OSError: the program is gone; this process goes on.
        """
        end_children()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os.execve(self.program, self.arguments, {**self.environment, VARIABLE: operation})  # noqa: S606 - our own command line


@contextmanager
def restarting(folder: RebuildFolder, *, least_limit: float = LEAST_START_LIMIT) -> Iterator[Path]:
    """Yield the checkpoint to serve; when the block has ended, restart if that is wanted.

    The block runs the server to its end, in the main thread. An error of a start that is an
    attempt does not leave this context: the process starts again.

    Args:
        folder: of this server.
        least_limit: seconds that an attempt may take at least until the server answers.

    Raises:
        CheckpointError: the checkpoint that answered last is gone.
    """
    command = Command.of_this_process()
    model = next_model(folder)
    limit = max(least_limit, START_FACTOR * folder.state.start_seconds)
    timer = threading.Timer(limit, _give_up, (folder, command, limit))
    if folder.state.attempt:
        timer.daemon = True
        timer.start()
    failure: BaseException | None = None
    try:
        yield model
    except BaseException as error:
        failure = error
        raise
    finally:
        timer.cancel()
        if timer.ident is not None:
            timer.join()  # if it is giving up already, that restarts this process
        if restart_wanted(folder, failure):
            command.run(_operation_id(folder.state))


def next_model(folder: RebuildFolder) -> Path:
    """The checkpoint that a server which starts now has to serve.

    That a swap wants, if this process was restarted for it; else the one that answered last. A
    swap that was interrupted has failed.

    Raises:
        CheckpointError: the checkpoint that answered last is gone.
    """
    restarted_for = os.environ.pop(VARIABLE, None)
    if restarted_for is not None:
        _reap()
    wanted = folder.state.wanted
    if wanted is not None:
        reason = _obstacle(folder, wanted, restarted_for) or _begin(folder, wanted)
        if reason is None:
            return folder.model(wanted)
        _fall_back(folder, reason)
    state = folder.state
    model = folder.model(state.serving)
    if not model.is_dir():
        raise CheckpointError(
            f"{model}: the checkpoint of the variant {state.serving!r}, which answered last, is "
            f"gone; expected it, or no {folder.state_file} to serve the base model"
        )
    return model


def restart_wanted(folder: RebuildFolder, error: BaseException | None = None) -> bool:
    """Whether the server that has ended is to start again in this process.

    Args:
        folder: of this server.
        error: what ended it; an attempt that it ended has failed.
    """
    state = folder.state
    if state.wanted is None or isinstance(error, KeyboardInterrupt):
        return False
    if not state.attempt:
        return True  # a swap has stopped it, however it took that
    if folder.answering.is_set() or (isinstance(error, SystemExit) and not error.code):
        return False  # it did start, or somebody has stopped it
    reason = "the server ended before it answered"
    if error is not None:
        text = " ".join(str(error).split())
        reason = f"{reason}: {type(error).__name__}: {text}; its log has more"
    _fall_back(folder, reason, error)
    return True


def end_children(seconds: float = END_SECONDS) -> None:
    """End every process that descends from this one: they hold memory and ports.

    Python's resource tracker stays: it ends with this program, after cleaning up.
    """
    running = [
        child
        for child in psutil.Process().children(recursive=True)
        if not _is_resource_tracker(child)
    ]
    for child in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    _, stubborn = psutil.wait_procs(running, seconds)
    for child in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(stubborn, seconds)


def _obstacle(folder: RebuildFolder, wanted: str, restarted_for: str | None) -> str | None:
    """Why the wanted checkpoint must not be tried now; None if it may."""
    if folder.state.attempt:
        return f"the server with {wanted!r} was killed before it answered"
    if restarted_for != _operation_id(folder.state):
        return f"the server was killed before it was restarted with {wanted!r}"
    model = folder.model(wanted)
    return None if model.is_dir() else f"{model}: the checkpoint is gone"


def _begin(folder: RebuildFolder, wanted: str) -> str | None:
    """Record that a start with the wanted checkpoint begins; why not, if that fails."""
    try:
        folder.update(RebuildState.attempting)
    except OSError as error:
        return f"the start with {wanted!r} could not be recorded: {error}"
    return None


def _fall_back(folder: RebuildFolder, reason: str, error: BaseException | None = None) -> None:
    """Record that the swap has failed; a full disk must not keep the old variant from serving."""
    logger.error("%s; serving %r again", reason, folder.state.serving, exc_info=error)
    try:
        folder.update(lambda state: state.failed(reason))
    except OSError:
        logger.exception("%s: not written", folder.state_file)
        folder.state = folder.state.failed(reason)


def _give_up(folder: RebuildFolder, command: Command, limit: float) -> None:
    """Start again without the wanted checkpoint, on a thread: the main one may hang."""
    if folder.answering.is_set() or not folder.state.attempt:
        return
    _fall_back(folder, f"the server did not answer within {limit:.0f} s")
    command.run(_operation_id(folder.state))


def _operation_id(state: RebuildState) -> str:
    return str((state.operation or {}).get("id", ""))


def _is_resource_tracker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any("resource_tracker" in part for part in process.cmdline())
    return False


def _reap() -> None:
    """Collect the children that ended with the former program; this one has none yet."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
