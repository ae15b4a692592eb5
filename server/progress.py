"""Progress bars with time left, as the plain callbacks that ``pruning`` expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from liveprune.pruning.search.run import Progress as SearchProgress


@contextmanager
def stage_bar(name: str) -> Iterator[Callable[[SearchProgress], None]]:
    """Yield what shows the progress of long work in stages, and the best so far if there is one."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[best]}"),
        console=Console(stderr=True),
    )
    task = bar.add_task(name, total=None, best="")

    def show(progress: SearchProgress) -> None:
        bar.start()
        best = "" if progress.best is None else f"best on train {100 * progress.best:.1f}"
        stage = f"{progress.stage} (from the journal)" if progress.replaying else progress.stage
        bar.update(
            task, description=stage, completed=progress.done, total=progress.total, best=best
        )

    try:
        yield show
    finally:
        bar.stop()


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
