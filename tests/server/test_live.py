from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from liveprune.patches.live_types import EngineMemory, KVStatus
from liveprune.server.live import default_target


class Engine:
    """The two questions that are asked, answered for an engine that has just come up."""

    def __init__(self, base_rows: int) -> None:
        self._memory = EngineMemory(base_rows, 0, 800, other_weights=50, process=0)

    async def memory(self) -> EngineMemory:
        return self._memory

    async def kv(self) -> KVStatus:
        return KVStatus(blocks=10, min_blocks=2, max_blocks=90, block_bytes=10)


def target(engine: Engine, folder: Path) -> int:
    return asyncio.run(default_target(engine, folder))  # type: ignore[arg-type]


def test_the_bound_is_what_is_used_at_start(tmp_path: Path) -> None:
    assert target(Engine(800), tmp_path) == 800 + 50 + 100


def test_a_compact_restart_keeps_room_for_what_was_swapped_out(tmp_path: Path) -> None:
    target(Engine(800), tmp_path)
    assert target(Engine(300), tmp_path) == 800 + 50 + 100


def test_a_first_start_that_is_compact_stays_so(tmp_path: Path) -> None:
    assert target(Engine(300), tmp_path) == 300 + 50 + 100
    assert target(Engine(800), tmp_path) == 800 + 50 + 100, "whole later: that counts from now"


def test_spare_rows_count(tmp_path: Path) -> None:
    engine = Engine(300)
    engine._memory = replace(engine._memory, spare_rows=7)
    assert target(engine, tmp_path) == 300 + 7 + 50 + 100
