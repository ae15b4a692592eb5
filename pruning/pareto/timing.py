"""Speed of one plan beside the full model, in the same warm engine.

What is timed is ``Engine.generate`` for one plan alone, as a user would see it. Three workloads in
each round: short prompts and one new token; long prompts and one; short prompts and many. Prefill
is the second minus the median first, decoding the third minus it: what every call costs, making
the plan live included, cancels out. Plan and full model take turns, so that what slows the machine
down for a while slows both, and only ratios within a round are compared.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from liveprune.pruning.errors import DataError, EngineError
from liveprune.pruning.evaluation.engine import Engine
from liveprune.pruning.plan import Plan

SHORT = 8
"""Tokens of a short prompt."""
Clock = Callable[[], tuple[float, float]]
"""Seconds now: of the wall, and of all threads of this process."""
Sample = dict[str, list[list[list[float]]]]
"""``full`` and ``plan``: by round, by workload (base, prefill, decode), wall and CPU seconds."""


@dataclass(frozen=True)
class Workload:
    """What is timed."""

    prompts: tuple[tuple[int, ...], ...]
    """Of equal length, longer than ``SHORT``; all at once are one batch."""
    new_tokens: int
    rounds: int
    """Measured ones, at least 3, for a spread; one more before them warms up."""

    def __post_init__(self) -> None:
        lengths = {len(prompt) for prompt in self.prompts}
        if len(lengths) != 1 or min(lengths) <= SHORT:
            raise DataError(
                f"prompts to time: found {sorted(lengths)} tokens, expected one length above "
                f"{SHORT}"
            )
        for name, found, least in (("new_tokens", self.new_tokens, 2), ("rounds", self.rounds, 3)):
            if found < least:
                raise DataError(f"{name} is {found}, expected at least {least}")

    @classmethod
    def of(
        cls,
        texts: Sequence[Sequence[int]],
        *,
        batch: int,
        prompt_tokens: int,
        new_tokens: int,
        rounds: int,
    ) -> Workload:
        """Cut ``texts``, one after another and over again, into prompts.

        Raises:
            DataError: an argument is out of range, or there is no text.
        """
        stream = [token for text in texts for token in text]
        if batch < 1 or prompt_tokens < 1 or not stream:
            raise DataError(
                f"prompts to time: found {batch} of {prompt_tokens} tokens cut from "
                f"{len(stream)}, expected at least 1 each"
            )
        stream *= -(-batch * prompt_tokens // len(stream))
        prompts = tuple(
            tuple(stream[start : start + prompt_tokens])
            for start in range(0, batch * prompt_tokens, prompt_tokens)
        )
        return cls(prompts, new_tokens, rounds)

    def to_json(self) -> dict[str, Any]:
        """What it is, the prompts by their digest of 32 hex digits."""
        text = repr(self.prompts).encode()
        return {
            "batch": len(self.prompts),
            "prompt_tokens": len(self.prompts[0]),
            "new_tokens": self.new_tokens,
            "rounds": self.rounds,
            "prompts": hashlib.blake2b(text, digest_size=16).hexdigest(),
        }

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return len(self.prompts[0]) + self.new_tokens

    @property
    def prefill_tokens(self) -> int:
        """That the long prompts have more than the short ones, over the batch."""
        return len(self.prompts) * (len(self.prompts[0]) - SHORT)

    @property
    def decode_tokens(self) -> int:
        """After the first of each prompt."""
        return len(self.prompts) * (self.new_tokens - 1)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the full model in the same round: median and ends."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, full: Sequence[float], plan: Sequence[float]) -> Ratio:
        ratios = [a / b for a, b in zip(full, plan, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class Pace:
    """Prefill or decoding of one plan."""

    tokens_per_second: float
    """Of the wall, by the median round; of this run and machine only."""
    wall: Ratio
    cpu: Ratio | None
    """None where the clock of this process is too coarse, or another one works."""


@dataclass(frozen=True)
class Speed:
    """One plan's, or the full model's."""

    prefill: Pace
    decode: Pace


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def measure(engine: Engine, plan: Plan, workload: Workload, clock: Clock | None = None) -> Sample:
    """Time the full model and ``plan`` in turns; by the machine's clocks, unless others are given.

    Raises:
        EngineError: the engine failed.
    """
    sample: Sample = {"full": [], "plan": []}
    for number in range(workload.rounds + 1):
        for name, side in (("full", None), ("plan", plan)):
            taken = _round(engine, side, workload, clock or _now)
            if number:
                sample[name].append(taken)
    return sample


def _round(
    engine: Engine, plan: Plan | None, workload: Workload, clock: Clock
) -> list[list[float]]:
    short = [prompt[:SHORT] for prompt in workload.prompts]
    taken = []
    for prompts, new in ((short, 1), (workload.prompts, 1), (short, workload.new_tokens)):
        wall, cpu = clock()
        engine.generate([plan], prompts, max_tokens=new, end=())
        wall_after, cpu_after = clock()
        taken.append([round(wall_after - wall, 6), round(cpu_after - cpu, 6)])
    return taken


def speeds(sample: Mapping[str, list[list[list[float]]]], workload: Workload) -> dict[str, Speed]:
    """The speeds of ``full`` and ``plan`` in a sample.

    Raises:
        EngineError: the workload is too short for what disturbs the machine.
    """
    paces: dict[str, list[Pace]] = {"full": [], "plan": []}
    parts = (("prefill", 1, workload.prefill_tokens), ("decode", 2, workload.decode_tokens))
    for part, place, tokens in parts:
        wall, cpu = (
            {side: _beyond_base(sample[side], place, unit) for side in paces} for unit in (0, 1)
        )
        least = min(seconds for side in wall.values() for seconds in side)
        if least <= 0:
            raise EngineError(
                f"{part}: found {tokens} tokens that took {1000 * least:.3f} ms more than none, "
                f"expected more than 0; time more tokens"
            )
        has_cpu = min(seconds for side in cpu.values() for seconds in side) > 0
        for side, found in paces.items():
            found.append(
                Pace(
                    tokens / statistics.median(wall[side]),
                    Ratio.of(wall["full"], wall[side]),
                    Ratio.of(cpu["full"], cpu[side]) if has_cpu else None,
                )
            )
    return {side: Speed(*found) for side, found in paces.items()}


def middle(full: Sequence[Speed]) -> Speed:
    """The full model's own speed, from its speeds beside several plans; at least one."""
    return Speed(
        *(
            Pace(
                statistics.median(pace.tokens_per_second for pace in paces),
                paces[0].wall,
                next((pace.cpu for pace in paces if pace.cpu is not None), None),
            )
            for paces in ([x.prefill for x in full], [x.decode for x in full])
        )
    )


def _beyond_base(rounds: Sequence[Sequence[Sequence[float]]], place: int, unit: int) -> list[float]:
    base = statistics.median(taken[0][unit] for taken in rounds)
    return [taken[place][unit] - base for taken in rounds]
