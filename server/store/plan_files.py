"""Plans as files named after their content, beside the database."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from liveprune.pruning.errors import PlanError
from liveprune.pruning.files import write_atomic
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_io import load_plan, save_plan


class PlanFiles:
    """A folder of ``DIGEST.json``, each with its matrices in ``DIGEST.safetensors``."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is made with mode 0700 if it is not there."""
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the plan with this digest is, in our own form."""
        return self.folder / f"{digest}.json"

    def save(self, plan: Plan) -> int:
        """Write a plan; one that is there already is written again, which mends it.

        Returns:
            Bytes of its files.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        save_plan(plan, self.path(plan.digest))
        return sum(file.stat().st_size for file in self.parts(plan.digest))

    def load(self, digest: str) -> Plan:
        """Read a plan.

        Raises:
            PlanError: it is missing, damaged, or not the one that its name promises.
        """
        path = self.path(digest)
        plan = load_plan(path)
        if plan.digest != digest:
            raise PlanError(f"{path}: holds the plan {plan.digest}, expected {digest}")
        return plan

    def discard(self, digest: str) -> None:
        """Delete a plan, if it is there."""
        for file in self._files(digest):
            file.unlink(missing_ok=True)

    def parts(self, digest: str) -> list[Path]:
        """The files of a plan."""
        path, matrices = self._files(digest)
        return [path, matrices] if matrices.exists() else [path]

    def put(self, name: str, content: bytes) -> None:
        """Write a file of a plan as it was elsewhere."""
        write_atomic(self.folder / name, content)

    def leftovers(self, counted: Collection[str]) -> list[Path]:
        """Files of plans that are not ``counted``, and those that a crash left half written."""
        return sorted(
            file
            for file in self.folder.iterdir()
            if file.name.startswith(".") or file.stem not in counted
        )

    def _files(self, digest: str) -> tuple[Path, Path]:
        path = self.path(digest)
        return path, path.with_suffix(".safetensors")
