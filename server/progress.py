"""A progress bar with time left, as the plain callback that ``pruning`` expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress_bar(label: str, *, binary: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yield ``update(done, total)``; the bar goes to standard error.

    Args:
        label: What is being done.
        binary: The steps are bytes.
    """
    steps = TaskProgressColumn() if binary else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), steps, TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task(label, total=None)

    def update(done: int, total: int) -> None:
        progress.start()  # at the first step only: a refusal before it stays one clean line
        progress.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        progress.stop()
