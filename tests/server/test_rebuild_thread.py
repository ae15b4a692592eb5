from __future__ import annotations

import asyncio
import threading

import pytest

from liveprune.server.rebuild_thread import Stop, beside


def test_both_ends_run_in_one_loop_of_another_thread() -> None:
    seen: list[tuple[str, object, int]] = []

    def note(what: str) -> None:
        seen.append((what, asyncio.get_running_loop(), threading.get_ident()))

    async def start() -> Stop:
        note("start")
        asyncio.get_running_loop().call_soon(note, "later")  # the loop runs on

        async def stop() -> None:
            note("stop")

        return stop

    with beside(start):
        assert seen[0][0] == "start"
        assert threading.get_ident() != seen[0][2]
    assert [what for what, _, _ in seen] == ["start", "later", "stop"]
    assert len({(loop, thread) for _, loop, thread in seen}) == 1


def test_what_cannot_start_raises_here() -> None:
    async def start() -> Stop:
        raise OSError("the port is taken")

    with pytest.raises(OSError, match="the port is taken"), beside(start):
        pytest.fail("the block must not run")


def test_what_cannot_stop_raises_here_but_never_hides_another_error() -> None:
    async def start() -> Stop:
        async def stop() -> None:
            raise OSError("the disk is full")

        return stop

    with pytest.raises(OSError, match="the disk is full"), beside(start):
        pass
    with pytest.raises(KeyboardInterrupt), beside(start):
        raise KeyboardInterrupt
