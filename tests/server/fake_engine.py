"""A ``LiveEngine`` without vLLM: rows, slots and KV blocks are counted, answers are hashes.

It refuses what the real one refuses, and notes after every call if a live slot names a row that
is not resident. Faults are injected with ``fail`` and ``hang``.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from liveprune.patches.live_counts import VariantCounts
from liveprune.patches.live_types import (
    EngineMemory,
    FillProgress,
    GoldenAnswer,
    KVStatus,
    Served,
)
from liveprune.patches.row_assignment import assign_rows
from liveprune.pruning.errors import EngineError, IncompatibleEnvironmentError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_guards import check_plan
from liveprune.pruning.plan_io import load_plan

Row = tuple[int, int]
"""Layer, row; rows from the number of experts on are spare."""

P = ParamSpec("P")
T = TypeVar("T")

READS = ("progress", "golden", "memory", "kv", "statistics")
METHODS = (
    "prepare",
    "progress",
    "cancel",
    "publish",
    "retire",
    "release",
    "golden",
    "memory",
    "kv",
    "resize_kv",
    "keep_reference",
    "score",
    "forget_scores",
    "generate",
    "statistics",
)
EXPERTS = 8
LAYERS = 3


def fake_base(folder: Path, **config: object) -> Path:
    """A folder with the config of a small Mixtral, and no weights: 3 layers, 8 experts, top-2."""
    folder.mkdir(parents=True, exist_ok=True)
    form = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_hidden_layers": LAYERS,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": 128,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(form))
    return folder


def fake_plan(*kept: Sequence[int], top_k: int = 1) -> Plan:
    """Keep these experts in each layer; one list stands for all layers."""
    lists = list(kept) * LAYERS if len(kept) == 1 else list(kept)
    layers = [LayerPlan(i, EXPERTS, top_k, tuple(ids)) for i, ids in enumerate(lists)]
    return Plan("mixtral", LAYERS, tuple(layers), Lineage("test"))


def plan_number(plan: Plan | None) -> float:
    """What the fake's scores are under a plan."""
    return 0.0 if plan is None else float(int(plan.digest[:6], 16))


@dataclass
class Fault:
    """Hits the calls of one method from the ``first`` on, ``times`` times."""

    method: str
    when: str
    first: int
    times: int
    error: Exception | None
    """None: it hangs."""


@dataclass
class Slot:
    plan: Plan | None
    rows: frozenset[Row]
    missing: list[Row] = field(default_factory=list)
    """Rows still to be filled."""
    total: int = 0
    live: bool = False
    failed: str = ""


def operation(
    effect: Callable[Concatenate[FakeEngine, P], T],
) -> Callable[Concatenate[FakeEngine, P], Coroutine[Any, Any, T]]:
    """A call to another process: who stops waiting for the answer does not stop the effect.

    Questions are answered sooner than changes are made.
    """
    method = effect.__name__
    turns = 1 if method in READS else 6

    @functools.wraps(effect)
    async def call(self: FakeEngine, /, *arguments: P.args, **named: P.kwargs) -> T:
        faults = self._begin(method)

        async def over_there() -> T:
            for _ in range(turns):
                await asyncio.sleep(0)
            for fault in faults:
                if fault.error is None:
                    await asyncio.get_running_loop().create_future()
                elif fault.when == "before":
                    raise fault.error
            answer = effect(self, *arguments, **named)
            self._check()
            for fault in faults:
                if fault.error is not None and fault.when == "after":
                    raise fault.error
            return answer

        task = asyncio.ensure_future(over_there())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    return call


class FakeEngine:
    """One engine, up with the base model or with one variant live."""

    def __init__(
        self,
        base: Path,
        *,
        slots: int = 4,
        resident: Plan | None = None,
        resident_slot: int = 0,
        spare_rows: int = 4,
        row_bytes: int = 1000,
        other_weights: int = 20_000,
        kv: KVStatus | None = None,
        fill_calls: int = 2,
        release_rows: int = 5,
    ) -> None:
        """``fill_calls``: looks at the progress until ready; ``release_rows``: in one call."""
        self.slots = slots
        self.spec = ModelSpec.from_path(base)
        self.held: dict[int, Slot] = {}
        self.resident: set[Row] = set()
        self.calls: Counter[str] = Counter()
        self.used_blocks = 0
        """KV blocks that requests hold: not given back."""
        self.busy: Counter[int] = Counter()
        """Requests in the engine, by slot."""
        self.corrupt: set[str | None] = set()
        """Digests of plans whose answers are wrong."""
        self.corrupt_on_release: set[str | None] = set()
        """Digests of plans whose answers go wrong with the next rows given back."""
        self.fill_error = ""
        """What the next filling fails with."""
        self.on_call: Callable[[str], None] | None = None
        """Told of every call as it begins."""
        self.peak_bytes = 0
        self.violations: list[str] = []
        """Times that a live slot named a row that was not resident: must stay empty."""
        self.salts: list[str | None] = []
        """Of every canary question."""
        self.counts: dict[str, VariantCounts] = {}
        """What ``statistics`` answers."""
        self.by_priority = True
        self.reference: tuple[TokenRow, ...] = ()
        """What ``keep_reference`` has kept."""
        self.references: list[Plan | None] = []
        """Whose that was, at each call."""
        self._spare_rows = spare_rows
        self._row_bytes = row_bytes
        self._other = other_weights
        self._kv = kv or KVStatus(blocks=20, min_blocks=4, max_blocks=200, block_bytes=500)
        self._fill_calls = fill_calls
        self._release_rows = release_rows
        self._faults: list[Fault] = []
        rows = self._assign(resident)
        self.held[resident_slot] = Slot(resident, rows, live=True)
        self.resident |= rows
        self._check()

    # What tests steer and look at.

    def fail(
        self, method: str, when: str = "before", *, first: int = 1, times: int = 1, error: str = ""
    ) -> None:
        """Raise EngineError ``before`` or ``after`` the effect; calls count from now on."""
        assert method in METHODS
        assert when in ("before", "after")
        text = error or f"injected {when} {method}"
        first += self.calls[method]
        self._faults.append(Fault(method, when, first, times, EngineError(text)))

    def hang(self, method: str, *, first: int = 1) -> None:
        """Never answer one call."""
        self._faults.append(Fault(method, "before", self.calls[method] + first, 1, None))

    def heal(self) -> None:
        """No more faults."""
        self._faults.clear()

    @property
    def live(self) -> set[int]:
        return {number for number, slot in self.held.items() if slot.live}

    @property
    def blocks(self) -> int:
        return self._kv.blocks

    @property
    def total_bytes(self) -> int:
        return (
            len(self.resident) * self._row_bytes
            + self._other
            + self._kv.blocks * self._kv.block_bytes
        )

    @property
    def needed(self) -> set[Row]:
        """Rows that some slot needs."""
        return {row for slot in self.held.values() for row in slot.rows}

    # The protocol.

    @operation
    def prepare(self, slot: int, plan: Path | None) -> None:
        if slot in self.held:
            raise EngineError(f"slot {slot}: in use, expected a free slot")
        if any(other.missing and not other.failed for other in self.held.values()):
            raise EngineError("another variant's rows are being filled; one at a time")
        recipe = None if plan is None else load_plan(plan)
        if recipe is not None:
            check_plan(recipe, self.spec)
        rows = self._assign(recipe)
        missing = sorted(rows - self.resident)
        self.held[slot] = Slot(recipe, rows, missing, len(missing), failed=self.fill_error)
        self.fill_error = ""

    @operation
    def progress(self, slot: int) -> FillProgress:
        held = self.held[slot]
        done = (held.total - len(held.missing)) * self._row_bytes
        total = held.total * self._row_bytes
        if held.failed:
            return FillProgress("failed", done, total, held.failed)
        if not held.missing:
            return FillProgress("ready", total, total)
        share = -(-held.total // self._fill_calls)
        filled, held.missing = held.missing[:share], held.missing[share:]
        self.resident.update(filled)
        return FillProgress("filling", done, total)

    @operation
    def cancel(self, slot: int) -> None:
        held = self.held.get(slot)
        if held is not None and held.live:
            raise EngineError(f"slot {slot}: live; expected one that was never published")
        self.held.pop(slot, None)

    @operation
    def publish(self, slot: int) -> None:
        if slot not in self.held or self.held[slot].missing or self.held[slot].failed:
            raise EngineError(f"slot {slot}: not ready")
        self.held[slot].live = True

    @operation
    def retire(self, slot: int) -> bool:
        if slot not in self.live:
            raise EngineError(f"slot {slot}: not live, expected a live slot")
        if self.busy[slot]:
            return False
        if self.live == {slot}:
            raise EngineError(f"slot {slot}: the only live one; something must serve")
        del self.held[slot]
        return True

    @operation
    def release(self) -> int:
        idle = sorted(self.resident - self.needed)[: self._release_rows]
        self.resident.difference_update(idle)
        if idle:
            self.corrupt |= self.corrupt_on_release
            self.corrupt_on_release.clear()
        return len(idle) * self._row_bytes

    @operation
    def golden(
        self, variant: Served, prompts: Sequence[Sequence[int]], tokens: int
    ) -> list[GoldenAnswer]:
        if variant.slot not in self.live:
            raise EngineError(f"{variant.name}: slot {variant.slot} is not live")
        self.salts.append(variant.salt)
        plan = self.held[variant.slot].plan
        digest = None if plan is None else plan.digest
        return [self._answer(digest, prompt, tokens) for prompt in prompts]

    def check_background(self) -> None:
        if not self.by_priority:
            raise IncompatibleEnvironmentError("found --scheduling-policy fcfs, expected priority")

    @operation
    def keep_reference(self, full: Served, rows: Sequence[TokenRow]) -> None:
        self.references.append(self.held[full.slot].plan)
        self.reference = tuple(rows)

    @operation
    def score(
        self, variant: Served, rows: Sequence[TokenRow], *, against_full: bool
    ) -> AnswerScores:
        assert not against_full or self.reference == tuple(rows)
        answer = np.array([token for row in rows for token in row.answer])
        values = np.full(len(answer), self._plan_number(variant))
        compared = (values, values) if against_full else ()
        return AnswerScores(answer, values, *compared)

    @operation
    def forget_scores(self) -> None:
        self.reference = ()

    @operation
    def generate(
        self,
        variant: Served,
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[tuple[int, ...]]:
        return [(int(self._plan_number(variant)), max_tokens, *sorted(end)) for _ in prompts]

    @operation
    def statistics(self) -> dict[str, VariantCounts]:
        return dict(self.counts)

    @operation
    def memory(self) -> EngineMemory:
        base = sum(row < EXPERTS for _, row in self.resident)
        return EngineMemory(
            base_rows=base * self._row_bytes,
            spare_rows=(len(self.resident) - base) * self._row_bytes,
            all_base_rows=LAYERS * EXPERTS * self._row_bytes,
            other_weights=self._other,
            process=self.total_bytes,
            slots={n: len(self.held[n].rows) * self._row_bytes for n in self.live},
        )

    @operation
    def kv(self) -> KVStatus:
        return self._kv

    @operation
    def resize_kv(self, blocks: int) -> KVStatus:
        kv = self._kv
        wanted = max(kv.min_blocks, min(blocks, kv.max_blocks))
        if wanted < kv.blocks:
            wanted = max(wanted, min(kv.blocks, self.used_blocks))
        self._kv = KVStatus(wanted, kv.min_blocks, kv.max_blocks, kv.block_bytes)
        return self._kv

    # Inside.

    def _assign(self, plan: Plan | None) -> frozenset[Row]:
        rows: set[Row] = set()
        for layer in self.spec.layers:
            taken = {row for index, row in self.needed if index == layer.index}
            spare = range(layer.experts, layer.experts + self._spare_rows)
            recipe = None if plan is None else plan.layer(layer.index)
            free = [row for row in spare if row not in taken]
            rows |= {(layer.index, row) for row in assign_rows(recipe, layer.experts, free).rows}
        return frozenset(rows)

    def _answer(self, digest: str | None, prompt: Sequence[int], tokens: int) -> GoldenAnswer:
        state = hashlib.blake2b(f"{digest} {list(prompt)}".encode(), digest_size=tokens).digest()
        found = [byte % 128 for byte in state]
        if digest in self.corrupt:
            found[-1] ^= 1
        return GoldenAnswer(found, [-(byte + 1) / 300 for byte in state])

    def _plan_number(self, variant: Served) -> float:
        """What tells plans apart; the slot must be live."""
        if variant.slot not in self.live:
            raise EngineError(f"{variant.name}: slot {variant.slot} is not live")
        return plan_number(self.held[variant.slot].plan)

    def _begin(self, method: str) -> list[Fault]:
        """Count a call; returns the faults that hit it."""
        self.calls[method] += 1
        count = self.calls[method]
        if self.on_call is not None:
            self.on_call(method)
        return [
            fault
            for fault in self._faults
            if fault.method == method and fault.first <= count < fault.first + fault.times
        ]

    def _check(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.total_bytes)
        for number in self.live:
            if missing := self.held[number].rows - self.resident:
                self.violations.append(f"slot {number} names missing rows {sorted(missing)}")
