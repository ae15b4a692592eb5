"""Statistics of live traffic: read from the engine, decayed, kept over restarts, compared.

Only requests to the bare model name count (``patches.admission``), by the variant that answered
them. A plan that prunes hides experts from its traffic: so what methods work from is the full
model's part, unless the operator asks for the sum.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from liveprune.patches.live_counts import BASE_KEY, VariantCounts
from liveprune.pruning.calibration.drift import drift
from liveprune.pruning.calibration.statistics import RoutingStatistics
from liveprune.pruning.errors import DataError, EngineError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.server.engine import LiveEngine
from liveprune.server.registry import Registry
from liveprune.server.running_task import running_task
from liveprune.server.usage_window import UsageWindow, added, routing_statistics, since, usage
from liveprune.server.variant import FULL, Variant

FOLDER = "statistics"
"""In the state folder of a model: ``KEY.safetensors`` for each variant, and ``calibrated/``."""
MOST_VARIANTS = 64
LEAST_TOKENS = 1.0
"""A variant whose window holds less is forgotten."""
DRIFT_TOKENS = 1000.0
"""With fewer, chance alone moves the distributions."""
ALL = "all"

logger = logging.getLogger("liveprune.statistics")


@dataclass(frozen=True)
class Drift:
    """Of the variant that the alias serves; 0 to 1 (``pruning.calibration.drift``)."""

    mean: float
    maximum: float
    layers: Mapping[int, float]
    """By layer index; layers that cannot be compared are not there."""


@dataclass(frozen=True)
class LayerUsage:
    """Quantiles over a layer's experts of the share of its choices that one gets."""

    p10: float
    p50: float
    p90: float
    max: float
    unused: int
    """Experts that got none."""


@dataclass(frozen=True)
class Summary:
    """What the admin API shows."""

    variants: Mapping[str, float]
    """Tokens in the window by full name; ``@DIGEST`` where no tag has the plan any more."""
    serving: str
    """Full name of what the alias serves."""
    drift: Drift | None
    why_no_drift: str
    """Empty where there is one."""
    layers: Mapping[int, LayerUsage] = field(default_factory=dict)
    """Of what serves, by layer index."""


class LiveCalibration:
    """The windows of one model's alias; lives in the event loop."""

    def __init__(
        self,
        engine: LiveEngine,
        registry: Registry,
        folder: Path,
        model: str,
        *,
        interval: float = 60.0,
        half_life: float = 86400.0,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Read what the last server left; a file that is damaged is put aside.

        Args:
            engine: whose counts are read.
            registry: which variant has which plan.
            folder: state folder of the model.
            model: fingerprint of the checkpoint.
            interval: seconds between two looks.
            half_life: seconds.
            now: seconds since 1970.
        """
        self._engine, self._registry, self._model = engine, registry, model
        self._folder = folder / FOLDER
        self._interval, self._half_life, self._now = interval, half_life, now
        self._seen: dict[str, VariantCounts] = {}
        self._turn = asyncio.Lock()
        self._windows: dict[str, UsageWindow] = {}
        self._changed: set[str] = set()
        self._last_calibrated: tuple[str, RoutingStatistics] | None = None
        self.counted: dict[str, float] = {}
        """Tokens since this server's start, by plan digest or ``BASE_KEY``; they never fall."""
        self.last_summary: Summary | None = None
        """Of the last look, for metrics."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._load()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look at the engine at each interval; once more, and save, at the end."""
        try:
            async with running_task(self._run(), "live statistics"):
                yield
        finally:
            await self._look()

    async def poll(self) -> None:
        """Take in what the engine has counted since the last look, and save it.

        Raises:
            EngineError: the engine does not answer.
            OSError: the files cannot be written.
        """
        async with self._turn:
            found = await self._engine.statistics()
            now = self._now()
            for key, counts in found.items():
                new = since(self._seen.get(key), counts)
                if not new.tokens:
                    continue
                self.counted[key] = self.counted.get(key, 0.0) + new.tokens
                window = self._windows.get(key)
                self._windows[key] = (
                    UsageWindow(new, now)
                    if window is None
                    else window.at(now, self._half_life).plus(new)
                )
                self._changed.add(key)
            self._seen = dict(found)
            gone = self._forget(now)
            await asyncio.to_thread(self._write, gone)
            self.last_summary = self.summary()

    def statistics(self, of: str = FULL) -> RoutingStatistics:
        """What methods can work from.

        Args:
            of: tag of a variant, or ``all``: the sum over variants whose experts are the base's.

        Raises:
            DataError: nothing was counted, or the variant merges experts.
        """
        now = self._now()
        if of == ALL:
            keys = [key for key in self._windows if self._is_base_like(key)]
        else:
            keys = [_key(self._registry.variant(of))]
        found = [
            self._windows[key].at(now, self._half_life).counts
            for key in keys
            if key in self._windows and self._fits(self._windows[key].counts)
        ]
        if not found or sum(x.tokens for x in found) < LEAST_TOKENS:
            raise DataError(
                f"live statistics of {of!r}: found no counted tokens, expected requests to "
                f"{self._registry.name!r} that it answered"
                + ("" if of == ALL else f" ({ALL!r} sums over the variants)")
            )
        return routing_statistics(added(found), self._model)

    def counted_by_name(self) -> dict[str, float]:
        """``counted`` by full name; variants that no tag has any more are left out."""
        known = self._registry.known.items()
        keys = {_key(variant): self._registry.full_name(tag) for tag, variant in known}
        return {name: self.counted[key] for key, name in keys.items() if key in self.counted}

    def summary(self) -> Summary:
        """Tokens, usage and drift as they are now."""
        now, registry = self._now(), self._registry
        tokens = {key: x.tokens_at(now, self._half_life) for key, x in self._windows.items()}
        names = {_key(x): registry.full_name(tag) for tag, x in registry.known.items()}
        variant = registry.known[registry.alias]
        serving = self._windows.get(_key(variant))
        moved, why = self._drift(variant, tokens.get(_key(variant), 0.0), serving)
        return Summary(
            variants={names.get(key, f"@{key}"): count for key, count in tokens.items()},
            serving=registry.full_name(variant.tag),
            drift=moved,
            why_no_drift=why,
            layers={} if serving is None else _quantiles(serving.counts),
        )

    def calibrated_path(self, digest: str) -> Path:
        """Where the statistics are that a plan was made from; whoever makes one puts them there."""
        return self.calibrated / f"{digest}.safetensors"

    @property
    def calibrated(self) -> Path:
        """Folder of ``calibrated_path``."""
        return self._folder / "calibrated"

    def _drift(
        self, variant: Variant, tokens: float, window: UsageWindow | None
    ) -> tuple[Drift | None, str]:
        if variant.plan is None:
            return None, "the full model was not calibrated"
        if window is None or tokens < DRIFT_TOKENS:
            return None, f"found {tokens:.0f} tokens, expected at least {DRIFT_TOKENS:.0f}"
        try:
            calibrated = self._calibrated(variant.plan.digest)
        except DataError as error:
            return None, str(error)
        if calibrated is None:
            return None, "the statistics that the plan was made from are not kept"
        found = drift(variant.plan, calibrated, usage(window.counts))
        if not found:
            return None, "a router map mixes the experts of every layer"
        return Drift(float(np.mean(list(found.values()))), max(found.values()), found), ""

    def _calibrated(self, digest: str) -> RoutingStatistics | None:
        """What ``calibrated_path`` holds; the last one is kept in memory."""
        if self._last_calibrated is None or self._last_calibrated[0] != digest:
            path = self.calibrated_path(digest)
            if not path.exists():
                return None
            self._last_calibrated = (digest, RoutingStatistics.load(path))
        return self._last_calibrated[1]

    def _fits(self, counts: VariantCounts) -> bool:
        """Every column is a base expert."""
        spec: ModelSpec = self._registry.spec
        return all(
            layer.index in counts.layers and len(counts.layers[layer.index].gates) == layer.experts
            for layer in spec.layers
        )

    def _is_base_like(self, key: str) -> bool:
        """The full model, or a known plan that neither merges nor maps."""
        if key == BASE_KEY:
            return True
        plans = [x.plan for x in self._registry.known.values() if x.plan is not None]
        plan = next((plan for plan in plans if plan.digest == key), None)
        return plan is not None and not any(
            x.merges or x.mapping in ("router_map", "expert_map") for x in plan.layers
        )

    def _forget(self, now: float) -> list[str]:
        """Drop windows that are empty by now, and the emptiest of too many."""
        tokens = {key: x.tokens_at(now, self._half_life) for key, x in self._windows.items()}
        order = sorted(tokens, key=tokens.__getitem__)
        gone = [key for key in order if tokens[key] < LEAST_TOKENS]
        gone += order[len(gone) : max(len(order) - MOST_VARIANTS, 0)]
        for key in gone:
            del self._windows[key]
        return gone

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._look()

    async def _look(self) -> None:
        try:
            await self.poll()
        except (EngineError, OSError) as error:
            logger.warning("live statistics are not up to date: %s", error)

    def _load(self) -> None:
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                self._windows[path.stem] = UsageWindow.load(path, self._model)
            except DataError as error:
                aside = path.with_suffix(".damaged")
                path.replace(aside)
                logger.warning("%s; put aside as %s", error, aside.name)

    def _write(self, gone: list[str]) -> None:
        for key in gone:
            (self._folder / f"{key}.safetensors").unlink(missing_ok=True)
        for key in sorted(self._changed.intersection(self._windows)):
            self._windows[key].save(self._folder / f"{key}.safetensors", self._model)
        self._changed.clear()


def _key(variant: Variant) -> str:
    return variant.digest or BASE_KEY


def _quantiles(counts: VariantCounts) -> dict[int, LayerUsage]:
    found = {}
    for index, values in usage(counts).items():
        if values.sum() > 0:
            share = values / values.sum()
            low, middle, high = np.quantile(share, [0.1, 0.5, 0.9])
            found[index] = LayerUsage(
                float(low),
                float(middle),
                float(high),
                float(share.max()),
                int(np.count_nonzero(share == 0)),
            )
    return found
