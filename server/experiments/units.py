"""What must be known per unit, in bounded memory: how many there are, and how they cluster.

A unit (a user, an API key) sends many requests, which are not independent. Variances are therefore
those of sums per unit; and a sample-ratio test counts units. Both rest on a 64-bit hash of the
unit that is independent of its arm.

- ``UnitSample`` keeps the hashes themselves while there are at most ``CAP``. Above, it halves the
  share of hash space that it looks at: exact counts within a random part of the units.
- ``ClusterSums`` adds up values by ``BUCKETS`` classes of the hash (random groups of units). The
  variance of the groups' sums is that of the units' sums without bias; what is approximate is its
  own scatter, about ``sqrt(2 / BUCKETS)`` = 9%.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiments.fields import Fields

CAP = 32_768
"""Hashes kept of one phase."""
BUCKETS = 256
_BITS = 64


def unit_hash(salt: bytes, experiment: str, unit: str) -> int:
    """64 bits that say nothing about the unit's arm or layer, whose hashes have other labels."""
    text = f"{len(experiment)}:unit:{experiment}{unit}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, key=salt, digest_size=8).digest(), "big")


@dataclass
class UnitSample:
    """Distinct units by arm: all of them, or those in a known share of hash space."""

    level: int = 0
    """The share is ``2 ** -level``."""
    arms: dict[int, str] = field(default_factory=dict)
    """Hash to arm."""
    cap: int = CAP

    def add(self, unit: int, arm: str) -> None:
        """See a unit, for the first time or again; its first arm stays."""
        if unit >> (_BITS - self.level) == 0 and unit not in self.arms:
            self.arms[unit] = arm
            while len(self.arms) > self.cap:
                self._shrink(self.level + 1)

    def merge(self, other: UnitSample) -> None:
        """Take in the units of another replica; one that both saw counts once."""
        self._shrink(max(self.level, other.level))
        for unit, arm in other.arms.items():
            self.add(unit, arm)

    def _shrink(self, level: int) -> None:
        self.level = level
        self.arms = {u: arm for u, arm in self.arms.items() if u >> (_BITS - level) == 0}

    def sampled(self) -> dict[str, int]:
        """Arm to distinct units in the sample."""
        found: dict[str, int] = {}
        for arm in self.arms.values():
            found[arm] = found.get(arm, 0) + 1
        return found

    def to_json(self) -> dict[str, object]:
        by_arm: dict[str, list[int]] = {}
        for unit, arm in self.arms.items():
            by_arm.setdefault(arm, []).append(unit)
        packed = {arm: _pack(np.array(units, np.uint64)) for arm, units in by_arm.items()}
        return {"level": self.level, "units": packed}

    @classmethod
    def from_json(cls, form: object) -> UnitSample:
        """Read what ``to_json`` wrote.

        Raises:
            ExperimentError: damaged.
        """
        fields = Fields(form, "units")
        level, packed = fields.count("level"), fields.any("units")
        fields.done()
        if not isinstance(packed, Mapping) or level > _BITS:
            raise fields.error("units", packed, "an object of arms, and a level of at most 64")
        arms = {
            int(unit): str(arm)
            for arm, text in packed.items()
            for unit in _unpack(text, np.dtype(np.uint64), "units")
        }
        return cls(level, arms)


def distinct_units(samples: list[UnitSample]) -> dict[str, int]:
    """Arm to distinct units over several phases, each once; estimated where samples are partial."""
    level = max((sample.level for sample in samples), default=0)
    found: dict[str, set[int]] = {}
    for sample in samples:
        for unit, arm in sample.arms.items():
            if unit >> (_BITS - level) == 0:
                found.setdefault(arm, set()).add(unit)
    return {arm: len(units) << level for arm, units in found.items()}


class ClusterSums:
    """Number and sum of values per class of units."""

    def __init__(
        self, counts: NDArray[np.float64] | None = None, sums: NDArray[np.float64] | None = None
    ) -> None:
        """``counts`` and ``sums``: float64 ``[BUCKETS]``; zeros if not given."""
        self.counts = np.zeros(BUCKETS) if counts is None else counts
        self.sums = np.zeros(BUCKETS) if sums is None else sums

    def add(self, unit: int, value: float) -> None:
        bucket = unit % BUCKETS
        self.counts[bucket] += 1
        self.sums[bucket] += value

    def merge(self, other: ClusterSums) -> None:
        self.counts += other.counts
        self.sums += other.sums

    def scores(self) -> NDArray[np.float64]:
        """What each class adds to the mean's error, float64 ``[BUCKETS]``; sums to 0.

        Linearised ratio (delta method): ``(sum_b - mean * count_b) / count``.
        """
        total = self.counts.sum()
        if total == 0:
            return np.zeros(BUCKETS)
        scores: NDArray[np.float64] = (self.sums - self.sums.sum() / total * self.counts) / total
        return scores

    def to_json(self) -> dict[str, str]:
        return {"counts": _pack(self.counts), "sums": _pack(self.sums)}

    @classmethod
    def from_json(cls, form: object) -> ClusterSums:
        """Read what ``to_json`` wrote.

        Raises:
            ExperimentError: damaged, or of another number of classes.
        """
        fields = Fields(form, "clusters")
        counts, sums = (
            _unpack(fields.any(name), np.dtype(np.float64), name) for name in ("counts", "sums")
        )
        fields.done()
        if len(counts) != BUCKETS or len(sums) != BUCKETS:
            raise fields.error("counts", f"{len(counts)} and {len(sums)} classes", str(BUCKETS))
        return cls(counts, sums)


def covariance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Covariance of two estimates from their scores per class, random groups."""
    return float(a @ b) * BUCKETS / (BUCKETS - 1)


def _pack(values: NDArray[np.generic]) -> str:
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def _unpack(text: Any, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    try:
        raw = base64.b64decode(text, validate=True)
        return np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype)
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"{name}: not readable: {error}") from error
