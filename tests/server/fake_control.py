"""A control plane that only remembers what it was asked, and answers as a test tells it to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI

from liveprune.pruning.errors import (
    ConflictError,
    IncompatibleEnvironmentError,
    LiveprunError,
    VariantError,
)
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.plan import Plan
from liveprune.server.admin_api import make_app
from liveprune.server.admin_key import key_digest
from liveprune.server.admin_server import AdminServer, start
from liveprune.server.audit import AuditLog
from liveprune.server.layer_views import LayerView
from liveprune.server.operations import Operation, State, Status, VariantView
from liveprune.server.store.store import Store

MODEL = "tiny"
KEY = "the-right-key"
BEARER = {"Authorization": f"Bearer {KEY}"}


def view(tag: str, **changes: Any) -> VariantView:
    facts: dict[str, Any] = {
        "name": f"{MODEL}:{tag}",
        "tag": tag,
        "digest": None if tag == "full" else f"digest-{tag}",
        "state": "live",
        "is_alias": tag == "full",
        "is_previous": False,
        "experts": {"min": 8, "max": 8, "total": 24},
        "top_k": {"min": 2, "max": 2},
        "row_bytes": 2400,
        "in_flight": 0,
    }
    return VariantView(**{**facts, **changes})


@dataclass
class FakeControl:
    """``steps``: states that an operation goes through, one at each look."""

    known: list[VariantView] = field(default_factory=lambda: [view("full")])
    steps: list[State] = field(default_factory=list)
    error: Exception | None = None
    ready: bool = True
    golden_mismatches: int = 0
    fingerprint: str = "abc"
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    made: dict[str, Operation] = field(default_factory=dict)
    kept: dict[str, list[LayerView]] = field(default_factory=dict)
    """By tag, what ``layers`` tells."""
    outcomes: dict[str | None, AnswerScores | LiveprunError] = field(default_factory=dict)
    """By digest of the plan, what ``score`` and ``generate`` do not make up."""
    busy: int = 0
    """Evaluations that are refused because an operation is under way, from now on."""
    impossible: str = ""
    """Why plans cannot be tried out."""
    before_answer: Callable[[], None] = lambda: None

    async def add(self, tag: str, plan: Path, *, idempotency_key: str | None = None) -> Operation:
        return self._call("add", tag, plan, idempotency_key)

    async def remove(self, tag: str, *, idempotency_key: str | None = None) -> Operation:
        self._must_know(tag)
        return self._call("remove", tag, idempotency_key)

    async def swap(
        self, tag: str, *, keep_previous: bool = False, idempotency_key: str | None = None
    ) -> Operation:
        self._must_know(tag)
        return self._call("swap", tag, keep_previous, idempotency_key)

    async def rollback(self, *, idempotency_key: str | None = None) -> Operation:
        return self._call("rollback", "full", idempotency_key)

    async def cancel(self, operation_id: str) -> Operation:
        self._call("cancel", operation_id)
        self.made[operation_id].state = State.CANCELLED
        return self.made[operation_id]

    @property
    def candidates(self) -> FakeControl:
        return self

    def check(self) -> None:
        if self.impossible:
            raise IncompatibleEnvironmentError(self.impossible)

    async def score(
        self, plans: Sequence[Plan | None], rows: Sequence[TokenRow], *, against_full: bool
    ) -> list[AnswerScores | LiveprunError]:
        self._ask("score", plans, list(rows), against_full)
        return [self.outcomes.get(_key(plan), self._scores(plan, rows)) for plan in plans]

    async def generate(
        self,
        plans: Sequence[Plan | None],
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[list[tuple[int, ...]] | LiveprunError]:
        self._ask("generate", plans, list(prompts), max_tokens, set(end))
        answers = [(len(prompt), max_tokens) for prompt in prompts]
        found: list[list[tuple[int, ...]] | LiveprunError] = []
        for plan in plans:
            error = self.outcomes.get(_key(plan))
            found.append(error if isinstance(error, LiveprunError) else answers)
        return found

    async def variants(self) -> list[VariantView]:
        return self.known

    async def layers(self, tag: str) -> list[LayerView]:
        self._must_know(tag)
        return self.kept[tag]

    async def status(self) -> Status:
        if self.error is not None:
            raise self.error
        running = [o for o in self.made.values() if not o.state.ended]
        return Status(
            model=MODEL,
            alias=f"{MODEL}:full",
            previous=None,
            ready=self.ready,
            operation=running[0] if running else None,
            expert_bytes=1000,
            spare_bytes=200,
            other_weight_bytes=30,
            kv_bytes=4000,
            kv_blocks=40,
            kv_max_blocks=80,
            process_bytes=9000,
            memory_target_bytes=6000,
            fingerprint=self.fingerprint,
            variants=tuple(self.known),
        )

    def operation(self, operation_id: str) -> Operation | None:
        found = self.made.get(operation_id)
        if found is not None and self.steps:
            found.state = self.steps.pop(0)
        if found is not None and found.state.ended and found.finished is None:
            found.finished = found.created + 1.5
        return found

    def operations(self) -> list[Operation]:
        return list(self.made.values())

    def _ask(self, kind: str, plans: Sequence[Plan | None], *others: Any) -> None:
        self.calls.append((kind, [_key(plan) for plan in plans], *others))
        if self.busy:
            self.busy -= 1
            raise ConflictError("swap is under way")
        if self.error is not None:
            raise self.error

    @staticmethod
    def _scores(plan: Plan | None, rows: Sequence[TokenRow]) -> AnswerScores:
        """Tells plans, and the tokens of the answers, apart."""
        answer = np.array([token for row in rows for token in row.answer])
        return AnswerScores(answer + (0 if plan is None else plan.layers[0].top_k), -answer / 8)

    def _must_know(self, tag: str) -> None:
        if tag not in [variant.tag for variant in self.known]:
            raise VariantError(f"variant {tag!r} is unknown; expected full")

    def _call(self, kind: str, tag: str, *others: Any) -> Operation:
        self.before_answer()
        self.calls.append((kind, tag, *others))
        if self.error is not None:
            raise self.error
        operation = Operation(kind, f"{MODEL}:{tag}", bytes_total=100)
        if kind != "cancel":
            self.made[operation.id] = operation
        return operation


def _key(plan: Plan | None) -> str | None:
    return None if plan is None else plan.digest


def admin_app(control: FakeControl, folder: Path, *keys: str) -> FastAPI:
    """The admin app with its files in ``folder``, which is also the only allowed root."""
    digests = tuple(key_digest(key) for key in keys or (KEY,))
    audit = AuditLog(Store(folder, "m"))
    return make_app(control, keys=lambda: digests, audit=audit, roots=[folder])


def audited(folder: Path) -> list[dict[str, Any]]:
    """The audit log of ``admin_app``, the oldest first."""
    return AuditLog(Store(folder, "m")).entries()[::-1]


def ask(app: FastAPI, method: str, path: str, **arguments: Any) -> httpx.Response:
    """One request without a socket, by default with the right key; defects become status 500."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            return await client.request(method, path, **{"headers": BEARER, **arguments})

    return asyncio.run(send())


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app on a free loopback port, in a thread; yields its URL."""
    loop = asyncio.new_event_loop()
    started: list[AdminServer] = []
    ready = threading.Event()
    ending = asyncio.Event()

    async def run() -> None:
        options = {}
        if hasattr(app.state, "events"):  # some apps are not the admin API
            options["on_stop"] = app.state.events.close
        started.append(await start(app, port=0, **options))
        ready.set()
        await ending.wait()
        await started[0].stop()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert ready.wait(30)
        yield started[0].url
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join()
        loop.close()
