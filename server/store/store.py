"""The store: one database and the plan files beside it, for one base model."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from liveprune.server.store.database import now, open_database, transaction
from liveprune.server.store.decisions import Decisions
from liveprune.server.store.experiment_rows import Clock
from liveprune.server.store.experiments import Experiments
from liveprune.server.store.jobs import Jobs
from liveprune.server.store.measurements import MeasurementRows
from liveprune.server.store.plan_files import PlanFiles
from liveprune.server.store.quota import check_room, drop_old_jobs
from liveprune.server.store.records import AuditRows, Evaluations, Settings, Swaps
from liveprune.server.store.secret import shared_secret
from liveprune.server.store.servers import Servers
from liveprune.server.store.variants import Variants

DATABASE = "store.db"
"""In the files' folder, where no other URL is given."""
KEEP_JOBS = 50
"""Ended jobs that keep their folders, where nothing else is said."""
ALL_JOBS = 100_000
"""More than there are."""
ALONE = "server"
"""Name of the only server of such a database."""


class Store:
    """All calls are blocking, whole or not at all, and may come from any thread.

    Attributes:
        url: of the database.
        files: folder of everything that is too large for rows.
        model: fingerprint of the base model.
        plans: files of plans.
        variants, servers, jobs, evaluations, swaps, audit, settings, experiments, measurements,
            decisions: the tables.
    """

    def __init__(
        self,
        files: Path,
        model: str,
        *,
        url: str | None = None,
        replica: str | None = None,
        quota: int = 0,
        keep_jobs: int = KEEP_JOBS,
        clock: Clock = now,
    ) -> None:
        """Open the database, and bring it up to this release.

        Args:
            files: where plans and jobs have their files; made with mode 0700. Replicas on several
                machines share it.
            model: fingerprint of the base model.
            url: of the database; None: SQLite in ``files``.
            replica: name of this server among those of the model; None: the host's, where there
                may be others.
            quota: bytes that files may take; 0: no bound.
            keep_jobs: ended jobs whose folders ``drop_old_jobs`` leaves.
            clock: of experiments.

        Raises:
            StoreError: the database is not usable.
            OSError: the folder is not.
        """
        files.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.files, self.model = files, model
        self._quota, self._keep_jobs = quota, keep_jobs
        self.url = url or f"sqlite:///{files.resolve() / DATABASE}"
        self._engine = open_database(self.url)
        engine = self._engine
        # Alone it needs no name, and a pod's host name is another after every restart.
        self.replica = replica or (ALONE if url is None else socket.gethostname())
        self.plans = PlanFiles(files / "plans")
        self.variants = Variants(engine, model)
        self.servers = Servers(engine, model, self.replica, self.variants)
        self.jobs = Jobs(engine, model)
        self.evaluations = Evaluations(engine, model)
        self.swaps = Swaps(engine, model)
        self.audit = AuditRows(engine, model)
        self.settings = Settings(engine, model)
        self.experiments = Experiments(engine, model, clock)
        self.measurements = MeasurementRows(engine, model, self.replica, clock)
        self.decisions = Decisions(engine, model, self.replica, self.experiments, clock)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A look at all tables at one moment."""
        with transaction(self._engine) as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            yield connection

    def writing(self) -> AbstractContextManager[Connection]:
        """All of it or nothing is written."""
        return transaction(self._engine)

    def salt(self) -> bytes:
        """The secret of the database that decides who gets which arm."""
        return shared_secret(self._engine)

    def integrity(self) -> list[str]:
        """What the database itself finds wrong with its files (SQLite only)."""
        with transaction(self._engine) as connection:
            if connection.dialect.name != "sqlite":
                return []
            found = connection.exec_driver_sql("PRAGMA integrity_check").scalars()
            return [problem for problem in found if problem != "ok"]

    def check_room(self) -> None:
        """Refuse to write more files where the quota is used up.

        Raises:
            StoreError: it is.
        """
        check_room(self.files, self._quota)

    def drop_old_jobs(self) -> list[str]:
        """Delete the folders of jobs that ended long ago; see ``quota.drop_old_jobs``.

        Raises:
            StoreError: the database failed.
        """
        return drop_old_jobs(self.files, self.jobs.list(limit=ALL_JOBS), self._keep_jobs)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()
