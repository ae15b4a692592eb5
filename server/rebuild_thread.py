"""The admin API where vLLM has no event loop in this process.

With several API servers, each is a process of its own and the first process only waits for them.
There the control plane runs beside it, in a thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

Stop = Callable[[], Awaitable[None]]


@contextmanager
def beside(start: Callable[[], Awaitable[Stop]]) -> Iterator[None]:
    """Await ``start`` in the event loop of a thread; at the end, await what it returned there.

    Raises:
        Exception: what ``start`` raises, before the block runs; what stopping raises, after it.
    """
    started: Future[None] = Future()
    ending = threading.Event()
    failure: list[Exception] = []

    async def run() -> None:
        try:
            stop = await start()
        except BaseException as error:  # noqa: BLE001 - raised in the other thread
            started.set_exception(error)
            return
        started.set_result(None)
        await asyncio.to_thread(ending.wait)
        try:
            await stop()
        except Exception as error:  # noqa: BLE001 - raised in the other thread
            failure.append(error)

    thread = threading.Thread(target=asyncio.run, args=(run(),), name="liveprune-admin")
    thread.start()
    started.result()
    try:
        yield
    finally:
        ending.set()
        thread.join()
    if failure:
        raise failure[0]
