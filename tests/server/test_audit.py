from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.errors import EngineError
from liveprune.server.audit import AuditLog, Change
from liveprune.server.store.store import DATABASE, Store


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    return AuditLog(Store(tmp_path, "m"))


def change(**parameters: Any) -> Change:
    return Change("0badcafe", "127.0.0.1", "POST", "/admin/v1/swap", parameters)


def damage(folder: Path) -> None:
    with sqlite3.connect(folder / DATABASE) as connection:
        connection.execute("DROP TABLE audit")


def test_a_change_leaves_two_rows(log: AuditLog) -> None:
    before = time.time()
    swap = change(variant="e4", note="a\nb")
    asyncio.run(log.asked(swap))
    asyncio.run(log.answered(swap, 202, operation="op1"))
    answered, asked = log.entries()
    assert before <= asked.pop("time") <= answered.pop("time") <= time.time()
    assert asked == {
        "event": "asked",
        "who": "0badcafe",
        "remote": "127.0.0.1",
        "method": "POST",
        "path": "/admin/v1/swap",
        "parameters": {"variant": "e4", "note": "a\nb"},
        "id": swap.id,
    }
    assert answered == {
        "event": "answered",
        "id": swap.id,
        "status": 202,
        "operation": "op1",
        "error": None,
    }


def test_rows_go_to_the_log_as_well(log: AuditLog, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "liveprune.audit"):
        asyncio.run(log.asked(change(variant="e4")))
    (entry,) = log.entries()
    del entry["time"]
    assert json.loads(caplog.messages[0]) == entry


def test_rows_stay_and_say_which_replica(log: AuditLog, tmp_path: Path) -> None:
    asyncio.run(log.asked(change()))
    other = Store(tmp_path, "m", replica="other")
    asyncio.run(AuditLog(other).asked(change()))
    assert [row["replica"] for row in other.audit.list()] == ["other", log._store.replica]
    assert len(log.entries(limit=1)) == 1


def test_what_cannot_be_recorded_is_refused(log: AuditLog, tmp_path: Path) -> None:
    damage(tmp_path)
    with pytest.raises(EngineError, match=r"nothing was changed.*no such table: audit"):
        asyncio.run(log.asked(change()))


def test_an_outcome_that_cannot_be_written_is_not_an_error(
    log: AuditLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(tmp_path)
    done = change()
    with caplog.at_level(logging.ERROR, "liveprune.audit"):
        asyncio.run(log.answered(done, 202, operation="op1"))
    assert f"lacks the outcome of {done.id}" in caplog.text


def test_rows_written_at_once_do_not_mix(log: AuditLog) -> None:
    changes = [change(number=number, padding="x" * 500) for number in range(20)]

    async def all_at_once() -> None:
        await asyncio.gather(*(log.asked(one) for one in changes))

    asyncio.run(all_at_once())
    assert sorted(x["parameters"]["number"] for x in log.entries()) == list(range(20))
