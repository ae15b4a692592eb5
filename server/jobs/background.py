"""Background work of one server, put together: jobs, their supervisor, and the engine's gate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from liveprune.pruning.errors import (
    ConflictError,
    DataError,
    IncompatibleEnvironmentError,
)
from liveprune.server.allowed_paths import AllowedPaths
from liveprune.server.background_gate import BackgroundGate
from liveprune.server.candidates import LiveCandidates
from liveprune.server.control_plane import ControlPlane
from liveprune.server.jobs.service import JobService
from liveprune.server.jobs.supervisor import Supervisor
from liveprune.server.live_calibration import LiveCalibration
from liveprune.server.store.store import Store


class LiveBackground:
    """The serving engine as the supervisor sees it: candidates, and the gate before them."""

    def __init__(self, candidates: LiveCandidates, gate: BackgroundGate) -> None:
        self._candidates, self._gate = candidates, gate

    async def allow(self, share: float) -> None:
        self._gate.share = share
        self._candidates.open()

    async def forbid(self, reason: str) -> None:
        await self._candidates.close(reason)

    async def interrupt(self) -> None:
        await self._candidates.interrupt()


class NoLiveBackground:
    """In rebuild mode: jobs have engines of their own."""

    async def allow(self, share: float) -> None: ...

    async def forbid(self, reason: str) -> None: ...

    async def interrupt(self) -> None: ...


class Background:
    """From ``start`` to ``stop``."""

    def __init__(
        self,
        store: Store,
        base: Path,
        control: ControlPlane,
        roots: Sequence[Path],
        *,
        admin_url: str,
        engine: LiveBackground | NoLiveBackground,
        prompts: Path,
        calibration: LiveCalibration | None = None,
    ) -> None:
        """Args:
        store: of the model.
        base: checkpoint folder of the base model.
        control: the live variants.
        roots: folders that rows may lie in.
        admin_url: where a worker of this machine reaches the admin API.
        engine: the serving one.
        prompts: folder of the kept prompts.
        calibration: live statistics; None where nothing is counted.
        """
        calibrated = None if calibration is None else calibration.calibrated
        self.supervisor = Supervisor(
            store, base, admin_url, engine, prompts=prompts, calibrated=calibrated
        )
        self.jobs = JobService(
            store,
            base,
            control,
            AllowedPaths(roots),
            self.supervisor,
            why_not_live=lambda: _why_not_live(control),
            live_statistics=lambda: _statistics(calibration),
            prompts=prompts,
        )

    def keys(self, others: Callable[[], Sequence[bytes]]) -> Callable[[], Sequence[bytes]]:
        """The admin keys of ``others``, and those of workers."""
        return lambda: (*others(), *self.supervisor.keys)


def _why_not_live(control: ControlPlane) -> str:
    try:
        control.candidates.check()
    except IncompatibleEnvironmentError as error:
        return str(error)
    except ConflictError:  # its variants are being restored: soon
        return ""
    return ""


async def _statistics(calibration: LiveCalibration | None) -> bytes:
    """What the full model answered lately, as a file's content.

    Raises:
        DataError: nothing was counted.
        EngineError: the engine does not answer.
    """
    if calibration is None:
        raise DataError("this server does not count (docs/live-calibration.md)")
    await calibration.poll()
    return await asyncio.to_thread(calibration.statistics().to_bytes)
