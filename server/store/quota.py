"""How much disk the store's files may take."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from liveprune.pruning.errors import StoreError
from liveprune.server.store.jobs import Job

JOBS = "jobs"
"""Below the files' folder: a folder for each job, by its id."""


def used_bytes(files: Path) -> int:
    """Bytes of all files below a folder; those that vanish meanwhile count as none."""
    total = 0
    for path in files.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def check_room(files: Path, quota: int) -> None:
    """Refuse to write more where the quota is used up; 0 is no bound.

    Raises:
        StoreError: it is.
    """
    if quota and (used := used_bytes(files)) >= quota:
        raise StoreError(
            f"store {files}: holds {used:,} bytes, expected less than the quota of {quota:,} "
            "(--store-quota); forget variants or raise it"
        )


def drop_old_jobs(files: Path, jobs: Sequence[Job], keep: int) -> list[str]:
    """Delete the folders of jobs that ended, but of the last ``keep``; rows and plans stay.

    A cancelled or failed job without its folder begins anew when it is resumed.

    Args:
        files: the store's.
        jobs: all of them, newest first.
        keep: ended jobs whose folders stay.

    Returns:
        Ids of the jobs whose folders are gone now.
    """
    dropped = []
    for job in [job for job in jobs if job.state.ended][keep:]:
        folder = files / JOBS / job.id
        if folder.is_dir():
            # What cannot be deleted is tried again next time; no server fails for it.
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                dropped.append(job.id)
    return dropped
