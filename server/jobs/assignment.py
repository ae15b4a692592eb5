"""What the server tells a worker: one JSON line on its standard input, secrets included.

Neither an argument nor the environment carries a secret, so no list of processes shows one. The
pipe stays open for as long as the server lives: its end tells the worker that it is alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Assignment:
    """One job for one worker process."""

    job: str
    """Its id."""
    owner: str
    """Under this name the job was claimed."""
    lease: float
    """Seconds."""
    store: str
    """URL of the database."""
    files: str
    """Folder of the model's files: plans, jobs, prompts."""
    model: str
    """Fingerprint of the base model."""
    replica: str
    base: str
    """Checkpoint folder of the base model."""
    admin_url: str
    admin_key: str
    """Opens the admin API for this worker alone, until it ends."""
    prompts: str
    """Folder of the kept prompts."""
    calibrated: str | None
    """Folder for the statistics that plans were made from, by the plans' digests."""

    @property
    def files_path(self) -> Path:
        return Path(self.files)

    @property
    def folder(self) -> Path:
        """The job's own files."""
        return job_folder(self.files_path, self.job)

    def line(self) -> bytes:
        """As it is sent."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Assignment:
        """The other end of ``line``.

        Raises:
            ValueError: not such a line.
        """
        fields: dict[str, Any] = json.loads(line)
        return cls(**fields)


def job_folder(files: Path, job: str) -> Path:
    """Where a job keeps its journal, log, rows and plan."""
    return files / "jobs" / job
