"""Which arm a request gets: a keyed hash of its unit, the same in every process and for ever.

Two hashes are taken of a unit. The first, keyed by the alias, says which experiment's layer of the
alias's traffic it lies in, so that experiments on one alias never share a unit. The second, keyed
by the experiment, is a point in [0, 1) that falls into one arm's intervals.

Intervals follow from the history of shares (``allocate``): a change moves no more than it must,
and only from arms that shrink to arms that grow. Nobody leaves an arm whose share grows.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiments.definition import PPM, Experiment

_BITS = 53
"""Of a float's mantissa: points are exact."""


@dataclass(frozen=True)
class Allocation:
    """Who owns which part of [0, 1)."""

    ends: tuple[int, ...]
    """Rising, in millionths; the last is 1,000,000."""
    arms: tuple[str, ...]
    """``arms[i]`` owns the points from ``ends[i - 1]`` (or 0) up to ``ends[i]``."""

    def shares(self) -> dict[str, int]:
        """Arm to millionths."""
        found: dict[str, int] = {}
        for start, end, arm in self._parts():
            found[arm] = found.get(arm, 0) + end - start
        return found

    def _parts(self) -> Iterable[tuple[int, int, str]]:
        return zip((0, *self.ends), self.ends, self.arms, strict=False)

    def moved_to(self, shares: Mapping[str, int]) -> Allocation:
        """The allocation with these shares that moves the fewest points.

        Shrinking arms give up the upper ends of their intervals, growing arms take them.

        Raises:
            ExperimentError: the shares are not non-negative millionths that sum to one.
        """
        _check(shares)
        surplus = {arm: now - shares.get(arm, 0) for arm, now in self.shares().items()}
        wanting = {arm: ppm - self.shares().get(arm, 0) for arm, ppm in shares.items()}
        parts: list[tuple[int, int, str]] = []
        for start, end, arm in reversed(list(self._parts())):
            given = min(max(surplus[arm], 0), end - start)
            surplus[arm] -= given
            free = end
            while free > end - given:
                taker = next(name for name in shares if wanting[name] > 0)
                part = min(wanting[taker], free - (end - given))
                wanting[taker] -= part
                parts.append((free - part, free, taker))
                free -= part
            if free > start:
                parts.append((start, free, arm))
        return _joined(reversed(parts))


def allocate(history: Sequence[Mapping[str, int]]) -> Allocation:
    """Intervals after a history of shares (arm to millionths), the first one included.

    Raises:
        ExperimentError: no shares, or some that are not millionths which sum to one.
    """
    if not history:
        raise ExperimentError("allocation: found no shares, expected those of the start")
    _check(history[0])
    parts, start = [], 0
    for arm, ppm in history[0].items():
        parts.append((start, start + ppm, arm))
        start += ppm
    allocation = _joined(parts)
    for shares in history[1:]:
        allocation = allocation.moved_to(shares)
    return allocation


def _check(shares: Mapping[str, int]) -> None:
    if any(ppm < 0 for ppm in shares.values()) or sum(shares.values()) != PPM:
        raise ExperimentError(
            f"allocation: found the shares {dict(shares)}, expected non-negative millionths that "
            f"sum to {PPM}"
        )


def _joined(parts: Iterable[tuple[int, int, str]]) -> Allocation:
    ends: list[int] = []
    arms: list[str] = []
    for start, end, arm in parts:
        if start == end:
            continue
        if arms and arms[-1] == arm:
            ends[-1] = end
        else:
            ends.append(end)
            arms.append(arm)
    return Allocation(tuple(ends), tuple(arms))


def point(salt: bytes, label: str, unit: str) -> float:
    """A unit's place in [0, 1): keyed BLAKE2b, 53 bits.

    Args:
        salt: secret of the server, at most 64 bytes, so that no client can choose its arm.
        label: what the place is for; hashes of different labels are independent.
        unit: as ``unit_of`` names it.
    """
    # The length keeps (label, unit) pairs apart that read the same when joined.
    text = f"{len(label)}:{label}{unit}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, key=salt, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> (64 - _BITS)) / (1 << _BITS)


def arm_of(allocation: Allocation, place: float) -> str:
    """The arm that owns a place in [0, 1)."""
    return allocation.arms[bisect_right(allocation.ends, place * PPM)]


def in_layer(salt: bytes, experiment: Experiment, unit: str) -> bool:
    """Whether the unit lies in the experiment's layer of its alias's traffic."""
    start, end = experiment.traffic
    if (start, end) == (0, PPM):
        return True
    return start <= point(salt, f"layer:{experiment.model}", unit) * PPM < end


def assign(
    salt: bytes, running: Iterable[tuple[Experiment, Allocation]], model: str, unit: str
) -> tuple[Experiment, str] | None:
    """The experiment on ``model`` that owns the unit, and its arm; None: no experiment does."""
    for experiment, allocation in running:
        if experiment.model == model and in_layer(salt, experiment, unit):
            return experiment, arm_of(allocation, point(salt, f"arm:{experiment.name}", unit))
    return None


def unit_of(
    chain: Sequence[str],
    headers: Mapping[str, str],
    body: Mapping[str, object],
    key_id: str | None,
    request_id: str,
) -> str:
    """Name the unit of a request: ``SOURCE=VALUE``, of the first source that it has.

    Args:
        chain: ``Experiment.unit``.
        headers: names in small letters.
        body: the parsed request.
        key_id: identifies the API key and is not the key.
        request_id: the last resort, the client's own where it sent one: a retry keeps its arm.
    """
    for source in chain:
        kind, _, name = source.partition(":")
        found: object = {"api-key": key_id, "request-id": request_id}.get(kind)
        if kind == "header":
            found = headers.get(name.lower())
        elif kind == "body":
            found = body.get(name)
        if isinstance(found, str) and found:
            return f"{source}={found}"
    return f"request-id={request_id}"
