"""What changes on a server, told to whoever listens, as server-sent events.

There is one poll for all listeners, and none while nobody listens. Of what changes faster than a
listener reads it gets the newest only, so nothing piles up for a slow one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

from pydantic import BaseModel

from liveprune.pruning.errors import LiveprunError
from liveprune.server.admin_errors import TooManyListenersError

Source = Callable[[], Awaitable[BaseModel]]
PROBLEMS = "problems"
"""Event with a JSON object: name of each event that cannot be had now, and why."""

logger = logging.getLogger("liveprune.admin")


class EventFeed:
    """Bodies by the name of their event, sent when their content has changed."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        every: float = 2.0,
        timeout: float = 5.0,
        heartbeat: float = 15.0,
        most: int = 32,
    ) -> None:
        """Nothing is asked before somebody listens.

        Args:
            sources: what to ask for the body of each event.
            every: seconds between two polls.
            timeout: seconds that a source may take; a slower one is a problem that is told.
            heartbeat: seconds of silence after which a comment is sent.
            most: listeners at once.
        """
        self._sources = dict(sources)
        self._every, self._timeout, self._heartbeat = every, timeout, heartbeat
        self._most = most
        self._listeners = 0
        self._polling: asyncio.Task[None] | None = None
        self._latest: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def check_room(self) -> None:
        """Refuse a listener that is one too many.

        Raises:
            TooManyListenersError: there are as many as there may be.
        """
        if self._listeners >= self._most:
            raise TooManyListenersError(
                f"events: found {self._listeners} listeners, expected fewer than {self._most}; "
                "close a page that is open elsewhere"
            )

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Poll while this holds; in an event loop."""
        self._listeners += 1
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll(), name="liveprune-events")
        try:
            yield
        finally:
            self._listeners -= 1
            if not self._listeners:
                self._polling.cancel()
                self._polling = None
                # The next listener must not see what was true then.
                self._latest.clear()
                self._reasons.clear()

    async def events(self, allowed: Callable[[], bool]) -> AsyncIterator[bytes]:
        """Everything now, then what changes; ends with ``close``, or once not ``allowed``."""
        sent: dict[str, str] = {}
        yield b": liveprune\n\n"
        while True:
            changed = self._changed
            for name, text in list(self._latest.items()):
                if self._closed or not allowed():
                    return
                if sent.get(name) != text:
                    sent[name] = text
                    yield f"event: {name}\ndata: {text}\n\n".encode()
            if self._closed or not allowed():
                return
            try:
                async with asyncio.timeout(self._heartbeat):
                    await changed.wait()
            except TimeoutError:
                yield b": still here\n\n"

    def close(self) -> None:
        """End all streams: the server stops."""
        self._closed = True
        self._wake()

    async def _poll(self) -> None:
        while True:
            await asyncio.gather(*(self._look(name) for name in self._sources))
            self._tell(PROBLEMS, json.dumps(dict(sorted(self._reasons.items()))))
            await asyncio.sleep(self._every)

    async def _look(self, name: str) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                text = (await self._sources[name]()).model_dump_json()
        except TimeoutError:
            self._fail(name, f"no answer within {self._timeout:g} s")
        except LiveprunError as error:
            self._fail(name, str(error))
        except Exception as error:  # noqa: BLE001 - one source that fails must not end the others
            kind = type(error).__name__
            self._fail(name, f"unexpected {kind}; the server's log has more", error)
        else:
            self._reasons.pop(name, None)
            self._tell(name, text)

    def _fail(self, name: str, reason: str, error: Exception | None = None) -> None:
        if self._reasons.get(name) != reason:
            logger.warning("events: no %s: %s", name, reason, exc_info=error)
        self._reasons[name] = reason

    def _tell(self, name: str, text: str) -> None:
        if self._latest.get(name) != text:
            self._latest[name] = text
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
