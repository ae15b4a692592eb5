"""Open the store's database: SQLite or PostgreSQL, brought up to this release's tables."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from liveprune.pruning.errors import IncompatibleEnvironmentError, StoreError

POSTGRESQL = "postgresql+psycopg"
BUSY_SECONDS = 30
"""That a writer waits for another one."""
_MIGRATING = 0x11FE
"""Of PostgreSQL's advisory lock, so that replicas that start together migrate one by one."""


def open_database(url: str) -> Engine:
    """Connect, and make or migrate the tables.

    Args:
        url: ``sqlite:////absolute/path`` or ``postgresql+psycopg://USER:PASSWORD@HOST/NAME``.

    Raises:
        StoreError: it is no such URL, not reachable, or was migrated by a newer release.
        IncompatibleEnvironmentError: the driver for PostgreSQL is not installed.
    """
    engine = _engine(_parsed(url))
    try:
        with transaction(engine) as connection:
            _migrate(connection, str(_shown(engine)))
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """All of it or nothing is written.

    Raises:
        StoreError: the database failed; nothing is written.
    """
    try:
        with engine.begin() as connection:
            yield connection
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()
        raise StoreError(f"store {_shown(engine)}: {reason[0] if reason else error!r}") from error


def exclusive(connection: Connection, model: str) -> None:
    """Wait for others that change the same model's shared rows; until the transaction's end.

    For what reads first and then writes what it found missing. SQLite has one writer anyway.
    """
    if connection.dialect.name == "postgresql":
        key = int.from_bytes(hashlib.blake2b(model.encode(), digest_size=8).digest(), signed=True)
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def upsert(connection: Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, or write them over those with the same primary key. All have the same columns.

    Within a transaction; others may insert the same at the same moment.
    """
    if not rows:
        return
    make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    keys = [column.name for column in table.primary_key]
    query = make(table)
    changed = {name: query.excluded[name] for name in rows[0] if name not in keys}
    connection.execute(query.on_conflict_do_update(index_elements=keys, set_=changed), list(rows))


def now(connection: Connection) -> float:
    """Seconds since 1970: PostgreSQL's own clock, on which its clients on all machines agree."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.scalar(sa.text("SELECT extract(epoch FROM clock_timestamp())")) or 0)


def revision() -> str:
    """The newest revision that this release knows."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def current_revision(connection: Connection) -> str | None:
    """The revision that the tables have."""
    return MigrationContext.configure(connection).get_current_revision()


def _parsed(url: str) -> URL:
    expected = f"expected sqlite:////PATH or {POSTGRESQL}://USER@HOST/NAME"
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        # Without the text: it may hold a password.
        raise StoreError(f"--store: not readable as a database URL; {expected}") from error
    if parsed.drivername == "postgresql":
        return parsed.set(drivername=POSTGRESQL)
    if parsed.drivername == POSTGRESQL:
        return parsed
    if parsed.drivername != "sqlite" or not Path(parsed.database or "").is_absolute():
        raise StoreError(
            f"--store: found {parsed.render_as_string(hide_password=True)}, {expected}"
        )
    return parsed


def _engine(url: URL) -> Engine:
    options: dict[str, Any] = {"json_serializer": _to_json}
    if url.drivername == "sqlite":
        _make_private(Path(url.database or ""))
        engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS}, **options)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_immediate)
        return engine
    try:
        return sa.create_engine(url, pool_pre_ping=True, **options)
    except (ImportError, NoSuchModuleError) as error:
        raise IncompatibleEnvironmentError(
            f"--store: PostgreSQL needs psycopg, which is not installed ({error}); install "
            "liveprune[postgres]"
        ) from error


def _to_json(value: object) -> str:
    # PostgreSQL has no NaN in JSON, and no other reader expects one.
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise StoreError(f"store: not to be written as JSON: {error}") from error


def _make_private(path: Path) -> None:
    """The file holds the audit log: only its owner reads it. SQLite's others copy its mode."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StoreError(f"store {path}: cannot be opened: {error.strerror}") from error


def _set_up_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy says, see below
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    # A transaction that reads first and writes later would fail where another one wrote meanwhile.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _migrate(connection: Connection, shown: str) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATING})
    config = _config()
    found, script = current_revision(connection), ScriptDirectory.from_config(config)
    known = {x.revision for x in script.walk_revisions()}
    if found is not None and found not in known:
        raise StoreError(
            f"store {shown}: has revision {found}, expected at most {revision()}: it was written "
            "by a newer release of Liveprune"
        )
    if found != script.get_current_head():
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def _shown(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=True)
