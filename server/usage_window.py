"""What an alias's traffic used lately: counts that lose half their weight in a half-life."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from liveprune.patches.live_counts import LayerCounts, Values, VariantCounts
from liveprune.pruning.calibration.statistics import LayerStatistics, RoutingStatistics
from liveprune.pruning.errors import DataError
from liveprune.pruning.files import write_atomic

FORMAT = "liveprune-usage-1"
_ARRAYS = ("gates", "sampled", "largest")


@dataclass(frozen=True, eq=False)
class UsageWindow:
    """The decayed counts of one variant."""

    counts: VariantCounts
    updated: float
    """Seconds since 1970; the weights are those of then."""

    def at(self, now: float, half_life: float) -> UsageWindow:
        """The same, weighted for ``now``; a clock that was set back changes nothing."""
        factor = self._factor(now, half_life)
        return UsageWindow(_scaled(self.counts, factor), max(now, self.updated))

    def tokens_at(self, now: float, half_life: float) -> float:
        """Tokens, weighted for ``now``."""
        return self.counts.tokens * self._factor(now, half_life)

    def _factor(self, now: float, half_life: float) -> float:
        return float(0.5 ** (max(now - self.updated, 0.0) / half_life))

    def plus(self, new: VariantCounts) -> UsageWindow:
        """With what was counted up to ``updated``."""
        return UsageWindow(added([self.counts, new]), self.updated)

    def save(self, path: Path, model: str) -> None:
        """Write one safetensors file; it appears whole or not at all. ``model``: fingerprint."""
        arrays = {
            f"{index}.{name}": np.ascontiguousarray(values)
            for index, layer in self.counts.layers.items()
            for name in _ARRAYS
            if (values := getattr(layer, name)) is not None
        }
        facts = {"tokens": self.counts.tokens, "updated": self.updated, "model": model}
        write_atomic(path, save(arrays, {"format": FORMAT, "facts": json.dumps(facts)}))

    @classmethod
    def load(cls, path: Path, model: str) -> UsageWindow:
        """Read what ``save`` wrote.

        Raises:
            DataError: not such a file, of another version, or of another model.
        """
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    found = metadata.get("format")
                    raise DataError(f"{path}: format is {found!r}, expected {FORMAT!r}")
                facts = json.loads(metadata["facts"])
                if facts["model"] != model:
                    raise DataError(f"{path}: of the model {facts['model']}, expected {model}")
                fields: dict[int, dict[str, Values]] = {}
                for name in file.keys():  # noqa: SIM118 - not a dict
                    index, _, field = name.partition(".")
                    fields.setdefault(int(index), {})[field] = file.get_tensor(name)
                layers = {index: LayerCounts(**fields[index]) for index in sorted(fields)}
                counts = VariantCounts(float(facts["tokens"]), layers)
                return cls(counts, float(facts["updated"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not readable as live usage: {error}") from error


def added(counts: Sequence[VariantCounts]) -> VariantCounts:
    """The sum of counts with the same columns, one or more; the largest entries' maximum."""
    first, *others = counts
    layers = {}
    for index, layer in first.layers.items():
        same = [layer, *(other.layers[index] for other in others)]
        layers[index] = LayerCounts(
            sum(x.gates for x in same),  # type: ignore[arg-type]
            _joined([x.sampled for x in same], np.add),
            _joined([x.largest for x in same], np.maximum),
        )
    return VariantCounts(sum(x.tokens for x in counts), layers)


def since(before: VariantCounts | None, now: VariantCounts) -> VariantCounts:
    """What came to an engine's counts since ``before``: all of it after a restart."""
    if before is None or now.tokens < before.tokens:
        return now
    layers = {
        index: LayerCounts(
            layer.gates - before.layers[index].gates,
            _joined([layer.sampled, before.layers[index].sampled], np.subtract),
            layer.largest,
        )
        for index, layer in now.layers.items()
    }
    return VariantCounts(now.tokens - before.tokens, layers)


def routing_statistics(counts: VariantCounts, model: str) -> RoutingStatistics:
    """As the observer pass would leave them, as far as they were counted; NaN for what was not.

    Sums of output norms are the sample's, scaled for each expert by its tokens over those in the
    sample. An expert that was used but is not in the sample takes its layer's mean norms.

    Args:
        counts: columns are the base's experts.
        model: Fingerprint of the checkpoint.
    """
    digest = hashlib.blake2b(digest_size=16)
    layers = {}
    for index, layer in counts.layers.items():
        sums = np.full((len(layer.gates), 3, 3), np.nan)
        sums[:, :, 0] = layer.gates
        largest = np.full(len(layer.gates), np.nan)
        if layer.sampled is not None and layer.largest is not None and layer.sampled.any():
            sums[:, :, 1:] = _scaled_norms(layer.gates, layer.sampled)
            largest = layer.largest.copy()
        layers[index] = LayerStatistics(sums, largest, np.full(len(layer.gates), np.nan))
        digest.update(sums.tobytes())
    return RoutingStatistics(layers, round(counts.tokens), digest.hexdigest(), model)


def _scaled_norms(gates: Values, sampled: Values) -> Values:
    """Sums [experts, 3, 2] of weight^a * norm^b, b = 1 and 2."""
    counts, seen = gates[:, 0], sampled[:, 0, 0]
    there = seen > 0
    ratio = np.where(there, counts / np.where(there, seen, 1), 0)
    mean = sampled[:, 0, 1:].sum(0) / seen.sum()
    found: Values = np.where(
        there[:, None, None], sampled[:, :, 1:] * ratio[:, None, None], gates[:, :, None] * mean
    )
    return found


def _scaled(counts: VariantCounts, factor: float) -> VariantCounts:
    layers = {
        index: LayerCounts(
            layer.gates * factor,
            None if layer.sampled is None else layer.sampled * factor,
            layer.largest,
        )
        for index, layer in counts.layers.items()
    }
    return VariantCounts(counts.tokens * factor, layers)


def _joined(values: Sequence[Values | None], join: Callable[[Any, Any], Values]) -> Values | None:
    """Of those that are there; None if none is. Samples are weighed against counts later."""
    there = [x for x in values if x is not None]
    if not there:
        return None
    found = there[0]
    for other in there[1:]:
        found = join(found, other)
    return found


def usage(counts: VariantCounts) -> Mapping[int, Values]:
    """[columns] by layer index: tokens sent to each expert."""
    return {index: layer.gates[:, 0] for index, layer in counts.layers.items()}
