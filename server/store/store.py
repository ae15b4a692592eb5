"""The store: one database and the plan files beside it, for one base model."""

from __future__ import annotations

import socket
from pathlib import Path

from liveprune.server.store.database import open_database
from liveprune.server.store.jobs import Jobs
from liveprune.server.store.plan_files import PlanFiles
from liveprune.server.store.records import AuditRows, Evaluations, Settings, Swaps
from liveprune.server.store.servers import Servers
from liveprune.server.store.variants import Variants

DATABASE = "store.db"
"""In the files' folder, where no other URL is given."""


class Store:
    """All calls are blocking, whole or not at all, and may come from any thread.

    Attributes:
        url: of the database.
        files: folder of everything that is too large for rows.
        model: fingerprint of the base model.
        plans: files of plans.
        variants, servers, jobs, evaluations, swaps, audit, settings: the tables.
    """

    def __init__(
        self, files: Path, model: str, *, url: str | None = None, replica: str | None = None
    ) -> None:
        """Open the database, and bring it up to this release.

        Args:
            files: where plans and jobs have their files; made with mode 0700. Replicas on several
                machines share it.
            model: fingerprint of the base model.
            url: of the database; None: SQLite in ``files``.
            replica: name of this server among those of the model; None: the host's.

        Raises:
            StoreError: the database is not usable.
            OSError: the folder is not.
        """
        files.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.files, self.model = files, model
        self.url = url or f"sqlite:///{files.resolve() / DATABASE}"
        self._engine = open_database(self.url)
        engine = self._engine
        self.replica = replica or socket.gethostname()
        self.plans = PlanFiles(files / "plans")
        self.variants = Variants(engine, model)
        self.servers = Servers(engine, model, self.replica, self.variants)
        self.jobs = Jobs(engine, model)
        self.evaluations = Evaluations(engine, model)
        self.swaps = Swaps(engine, model)
        self.audit = AuditRows(engine, model)
        self.settings = Settings(engine, model)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()
