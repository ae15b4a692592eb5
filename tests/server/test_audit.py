from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.errors import EngineError
from liveprune.server.audit import AuditLog, Change


def change(**parameters: Any) -> Change:
    return Change("0badcafe", "127.0.0.1", "POST", "/admin/v1/swap", parameters)


def lines(log: AuditLog) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_a_change_leaves_two_lines(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "new" / "audit.log")
    before = datetime.now(UTC).timestamp()
    swap = change(variant="e4", note="a\nb")
    asyncio.run(log.asked(swap))
    asyncio.run(log.answered(swap, 202, operation="op1"))
    asked, answered = lines(log)
    # Milliseconds are cut off, not rounded.
    assert datetime.fromisoformat(asked.pop("time")).timestamp() >= before - 0.001
    assert asked == {
        "event": "asked",
        "who": "0badcafe",
        "remote": "127.0.0.1",
        "method": "POST",
        "path": "/admin/v1/swap",
        "parameters": {"variant": "e4", "note": "a\nb"},
        "id": swap.id,
    }
    answered.pop("time")
    assert answered == {
        "event": "answered",
        "id": swap.id,
        "status": 202,
        "operation": "op1",
        "error": None,
    }


def test_the_file_is_private_and_only_grows(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    asyncio.run(AuditLog(path).asked(change()))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    asyncio.run(AuditLog(path).asked(change()))
    assert len(lines(AuditLog(path))) == 2


def test_lines_go_to_the_log_as_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(tmp_path / "audit.log")
    with caplog.at_level(logging.INFO, "liveprune.audit"):
        asyncio.run(log.asked(change(variant="e4")))
    assert json.loads(caplog.messages[0]) == lines(log)[0]


def test_every_line_is_on_disk_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path / "audit.log")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    asyncio.run(log.asked(change()))
    assert synced == [log.path.stat().st_size]


def test_a_file_that_was_moved_away_is_made_again(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log")
    asyncio.run(log.asked(change()))
    log.path.rename(tmp_path / "audit.log.1")
    asyncio.run(log.asked(change()))
    assert len(lines(log)) == 1


def test_an_unwritable_log_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "audit.log").mkdir()
    with pytest.raises(OSError, match="directory"):
        AuditLog(tmp_path / "audit.log")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "audit.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        AuditLog(tmp_path / "audit.log")


def test_a_full_disk_refuses_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path / "audit.log")
    asyncio.run(log.asked(change()))
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:7]))
    with pytest.raises(EngineError, match=r"nothing was changed.*audit\.log.*7 of \d+ bytes"):
        asyncio.run(log.asked(change()))
    monkeypatch.setattr(os, "write", write)
    asyncio.run(log.asked(change()))
    assert len(lines(log)) == 2


def test_an_outcome_that_cannot_be_written_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = AuditLog(tmp_path / "audit.log")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk gone")))
    done = change()
    with caplog.at_level(logging.ERROR, "liveprune.audit"):
        asyncio.run(log.answered(done, 202, operation="op1"))
    assert done.id in caplog.text


def test_lines_written_at_once_do_not_mix(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log")
    changes = [change(number=number, padding="x" * 500) for number in range(20)]

    async def all_at_once() -> None:
        await asyncio.gather(*(log.asked(one) for one in changes))

    asyncio.run(all_at_once())
    assert sorted(entry["parameters"]["number"] for entry in lines(log)) == list(range(20))
