"""The store in one file, to be kept, read by others, or put into another database.

A tar of ``store.json`` (all rows of one model) and the plan files: it moves a store from SQLite to
PostgreSQL as well.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from liveprune.pruning.errors import ConflictError, StoreError
from liveprune.server.store import schema
from liveprune.server.store.database import now, revision
from liveprune.server.store.experiment_rows import ExperimentState
from liveprune.server.store.store import Store

TABLES = {x.name: x for x in schema.metadata.tables.values() if not x.info.get(schema.PRIVATE)}
ROWS = "store.json"
PLANS = "plans/"


def export(store: Store) -> dict[str, Any]:
    """All rows of the store's model, as plain JSON, of one moment. They hold no secrets."""
    found: dict[str, Any] = {"revision": revision(), "model": store.model}
    with store.reading() as connection:
        for name, table in TABLES.items():
            query = sa.select(table).where(table.c.model == store.model)
            rows = connection.execute(query.order_by(*table.primary_key)).mappings()
            found[name] = [dict(row) for row in rows]
    return found


def back_up(store: Store, path: Path) -> None:
    """Write a backup; servers may go on meanwhile. The file appears whole, mode 0600.

    Raises:
        ConflictError: a variant was forgotten while its plan was read; try again.
        StoreError: the database failed.
        OSError: the disk is full, or the file cannot be written.
    """
    rows = export(store)
    temporary = path.with_name(f".{path.name}.new")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                _add(tar, ROWS, json.dumps(rows, indent=1).encode())
                for digest in sorted({row["digest"] for row in rows["variants"]}):
                    for part in store.plans.parts(digest):
                        _add(tar, f"{PLANS}{part.name}", part.read_bytes())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except FileNotFoundError as error:
        raise ConflictError(f"{error.filename}: was deleted meanwhile; try again") from error
    finally:
        temporary.unlink(missing_ok=True)


def restore(store: Store, path: Path) -> None:
    """Put a backup into a store that is empty.

    Experiments that ran are stopped: who gets which arm follows from a secret of the database that
    they ran in, so the arms' units would be others from here on.

    Raises:
        StoreError: it is no backup, of another model or revision, or the database failed.
        ConflictError: the store holds something already.
    """
    rows, files = _read(path)
    expected = {"revision": revision(), "model": store.model}
    for name, value in expected.items():
        if rows.get(name) != value:
            raise StoreError(f"{path}: {name} is {rows.get(name)!r}, expected {value!r}")
    if any(export(store)[name] for name in TABLES):
        raise ConflictError("the store is not empty, expected a new one")
    for name, content in files.items():
        store.plans.put(name, content)
    with store.writing() as connection:
        for name, table in TABLES.items():
            for row in rows[name]:
                # Numbers that count up are the new database's own.
                own = isinstance(table.c.get("id"), sa.Column) and table.c.id.autoincrement is True
                values = {key: x for key, x in row.items() if not (own and key == "id")}
                connection.execute(table.insert().values(values))
        table = schema.experiments
        running = (table.c.model == store.model, table.c.state == ExperimentState.RUNNING.value)
        ended = {"state": ExperimentState.STOPPED.value, "ended": now(connection)}
        why = {"reason": "restored from a backup", "owner": None}
        connection.execute(table.update().where(*running).values(**ended, **why))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o600
    tar.addfile(entry, io.BytesIO(content))


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, bytes]]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for entry in tar:
                content = tar.extractfile(entry)
                if content is not None:
                    files[entry.name] = content.read()
        rows = json.loads(files.pop(ROWS))
    except (tarfile.TarError, OSError, KeyError, ValueError) as error:
        raise StoreError(f"{path}: not readable as a backup of the store: {error}") from error
    plans = {name.removeprefix(PLANS): content for name, content in files.items()}
    # Names become paths.
    bad = [name for name in plans if Path(name).name != name or name.startswith(".")]
    if bad:
        raise StoreError(f"{path}: found a file named {bad[0]!r}, expected plans only")
    return rows, plans
