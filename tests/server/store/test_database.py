from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from liveprune.pruning.errors import StoreError
from liveprune.server.store.database import (
    current_revision,
    now,
    open_database,
    revision,
    transaction,
)
from liveprune.server.store.schema import metadata, settings


def test_the_migrations_make_the_tables_of_the_schema(url: str) -> None:
    engine = open_database(url)
    with transaction(engine) as connection:
        assert current_revision(connection) == revision()
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_opening_again_changes_nothing(url: str) -> None:
    first = open_database(url)
    row = {"model": "m", "key": "k", "value": {"x": 1.5}, "updated": 1.0}
    with transaction(first) as connection:
        connection.execute(settings.insert().values(row))
    second = open_database(url)
    with transaction(second) as connection:
        assert connection.execute(sa.select(settings)).mappings().one() == row
    for engine in (first, second):
        engine.dispose()


def test_a_newer_database_is_refused(url: str) -> None:
    engine = open_database(url)
    with transaction(engine) as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(StoreError, match="has revision 9999, expected at most 0002"):
        open_database(url)


def test_what_fails_is_not_written_in_part(url: str) -> None:
    engine = open_database(url)
    row = {"model": "m", "key": "k", "value": 1, "updated": 1.0}

    def write() -> None:
        with transaction(engine) as connection:
            for key in ("k", "other", "k"):
                connection.execute(settings.insert().values({**row, "key": key}))

    with pytest.raises(StoreError, match=r"(?i)unique"):
        write()
    with transaction(engine) as connection:
        assert connection.execute(sa.select(settings)).all() == []
    engine.dispose()


def test_the_clock_goes_on_within_a_transaction(url: str) -> None:
    engine = open_database(url)
    with transaction(engine) as connection:
        first, second = now(connection), now(connection)
    engine.dispose()
    assert second >= first > 1.7e9


def _open(url: str, results: multiprocessing.Queue[str]) -> None:
    try:
        open_database(url).dispose()
        results.put("")
    except Exception as error:  # noqa: BLE001 - the test reports it
        results.put(repr(error))


def test_several_may_start_together(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_open, args=(url, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [""] * 4
    for process in processes:
        process.join()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("nonsense", "not readable as a database URL"),
        ("sqlite://", "found sqlite://, expected sqlite:////PATH"),
        ("sqlite:///relative.db", "expected sqlite:////PATH"),
        ("mysql://me:secret@host/x", r"found mysql://me:\*\*\*@host/x, expected"),
    ],
)
def test_other_urls_are_refused(bad: str, reason: str) -> None:
    with pytest.raises(StoreError, match=reason) as caught:
        open_database(bad)
    assert "secret" not in str(caught.value)


def test_a_password_is_never_shown() -> None:
    url = "postgresql://me:secret@127.0.0.1:1/x?connect_timeout=2"
    with pytest.raises(StoreError, match=r"me:\*\*\*@127.0.0.1:1/x") as caught:
        open_database(url)
    assert "secret" not in str(caught.value)


def test_an_unusable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be opened"):
        open_database(f"sqlite:///{tmp_path}/file/store.db")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_text("not a database at all, but long enough to be taken for one" * 30)
    with pytest.raises(StoreError, match="not a database"):
        open_database(f"sqlite:///{path}")


def test_the_file_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "new" / "store.db"
    engine = open_database(f"sqlite:///{path}")
    with transaction(engine) as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    engine.dispose()
    assert modes == dict.fromkeys(("store.db", "store.db-wal", "store.db-shm"), 0o600)
