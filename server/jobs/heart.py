"""A worker's sign of life: keeps the lease, carries news to the store, brings orders back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from liveprune.server.store.jobs import Job, Jobs, LeaseLostError

logger = logging.getLogger("liveprune.jobs")


class Heart:
    """Beats in a thread of its own, thrice a lease, and at once where there is news.

    ``cancelled`` is set as soon as an operator asks for it, ``lost`` once the job is another's.
    """

    def __init__(
        self,
        jobs: Jobs,
        job: str,
        owner: str,
        lease: float,
        *,
        on_lost: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``on_lost``: called in the heart's thread; the work must not go on."""
        self.cancelled = threading.Event()
        """Stop at the next safe point."""
        self.cancel_asked = False
        """Because of an operator, not because the server stops."""
        self._jobs, self._job, self._owner, self._lease = jobs, job, owner, lease
        self._on_lost = on_lost
        self._clock = clock
        self._lock = threading.Lock()
        self._news: dict[str, Mapping[str, Any]] = {}
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def tell(
        self,
        *,
        progress: Mapping[str, Any] | None = None,
        best: Mapping[str, Any] | None = None,
        cost: Mapping[str, Any] | None = None,
    ) -> None:
        """Have the newest of each carried to the store with the next beat, which comes at once."""
        news = {"progress": progress, "best": best, "cost": cost}
        with self._lock:
            self._news |= {name: value for name, value in news.items() if value is not None}
        self._wake.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Carry the last news and stop; the lease is still held."""
        self._stopped = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        last = self._clock()
        stopping = False
        while not stopping:
            self._wake.wait(self._lease / 3)
            stopping = self._stopped
            self._wake.clear()
            try:
                self._beat()
                last = self._clock()
            except LeaseLostError as error:
                logger.error("the job is another's: %s", error)  # noqa: TRY400 - no traceback
                self._on_lost()
                return
            except Exception as error:  # noqa: BLE001 - a database that is away may come back
                logger.warning("no beat: %s: %s", type(error).__name__, error)
                if self._clock() - last > self._lease:
                    self._on_lost()
                    return

    def _beat(self) -> None:
        with self._lock:
            news, self._news = self._news, {}
        try:
            job: Job = self._jobs.beat(self._job, self._owner, self._lease, **news)
        except BaseException:
            with self._lock:
                self._news = {**news, **self._news}
            raise
        if job.cancel_asked and not self.cancel_asked:
            self.cancel_asked = True
            self.cancelled.set()
