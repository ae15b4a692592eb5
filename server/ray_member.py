"""One place of a pool: an actor and, should that die, the next one in its stead."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from liveprune.server.ray_actor import Process
from liveprune.server.ray_work import Chunk


class State(Enum):
    """What a member waits for."""

    PLACING = auto()
    """Ray has not found room for the actor yet, or it has not said who it is."""
    STARTING = auto()
    """Its engine loads the model."""
    IDLE = auto()
    BUSY = auto()
    GONE = auto()
    """Died too often in a row."""


class Member:
    """Everything the pool knows of one place; how it goes on is the pool's business.

    Attributes:
        pending: the reference of Ray's that is waited for, None if idle or gone.
        chunk: what a busy one runs.
        deaths: in a row, since its last answer.
        cause: of the last one.
        since: when the present actor was asked for, ``time.monotonic``.
    """

    def __init__(self, number: int, make: Callable[[], Any]) -> None:
        """``number`` is the place, from 0; ``make`` asks Ray for an actor."""
        self.number = number
        self.deaths = 0
        self.cause = ""
        self.process: Process | None = None
        self._make = make
        self.place()

    def __str__(self) -> str:
        where = "no machine yet" if self.process is None else str(self.process)
        return f"actor {self.number + 1} ({where})"

    def place(self) -> None:
        """Ask for a fresh actor."""
        self.process = None
        self.chunk: Chunk | None = None
        self.state = State.PLACING
        self.since = time.monotonic()
        self.actor: Any = self._make()
        self.pending: Any = self.actor.introduce.remote()

    def start(self, process: Process) -> None:
        self.process = process
        self.state = State.STARTING
        self.pending = self.actor.start.remote()

    def ask(self, chunk: Chunk, *arguments: Any) -> None:
        self.chunk = chunk
        self.state = State.BUSY
        self.pending = self.actor.ask.remote(*arguments)

    def rest(self) -> None:
        """It has started, or answered."""
        self.chunk = None
        self.state = State.IDLE
        self.pending = None

    def leave(self, cause: str) -> None:
        self.cause = cause
        self.chunk = None
        self.state = State.GONE
        self.pending = None
