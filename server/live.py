"""Live variants in the server's process: between vLLM's engine and its first request."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from liveprune.patches import admission
from liveprune.patches.entry import Front
from liveprune.patches.live_engine import VLLMLiveEngine
from liveprune.pruning.files import write_atomic
from liveprune.server import admin_server, live_metrics, public_health
from liveprune.server.admin_api import make_app
from liveprune.server.admin_key import server_keys
from liveprune.server.allowed_paths import default_roots
from liveprune.server.audit import AuditLog
from liveprune.server.background_gate import BackgroundGate
from liveprune.server.control import Control
from liveprune.server.engine import LiveEngine
from liveprune.server.experimenting import experimenting
from liveprune.server.experiments.live import LiveExperiments
from liveprune.server.golden import Canaries, canary_prompts, engine_key, read_prompts
from liveprune.server.jobs.background import Background, LiveBackground, NoLiveBackground
from liveprune.server.kept_prompts import FOLDER as PROMPTS
from liveprune.server.kept_prompts import KeptPrompts
from liveprune.server.live_calibration import LiveCalibration
from liveprune.server.live_options import LiveOptions, remember_resident
from liveprune.server.memory_budget import total_bytes
from liveprune.server.operation_records import OperationRecords
from liveprune.server.rebuild import RebuildControl
from liveprune.server.rebuild_restart import restarting
from liveprune.server.rebuild_state import RebuildFolder
from liveprune.server.state_folder import StateFolder

ROWS_FILE = "rows"
"""In the state folder of a model: bytes of the base experts' rows at its greatest start."""

logger = logging.getLogger("liveprune")


class LiveServer:
    """What ``liveprune serve`` adds to vLLM's server, from one start to one stop."""

    def __init__(
        self,
        base: Path,
        folder: StateFolder,
        options: LiveOptions,
        resident: str | None,
        public_keys: Collection[str] = (),
    ) -> None:
        """Take the admin port and check the keys: before a model is loaded.

        Args:
            base: the checkpoint's folder.
            folder: the opened state folder; closed at the end.
            options: the command line's.
            resident: tag that the engine starts with; None: the whole model.
            public_keys: keys of the public API; they never open the admin API.

        Raises:
            LiveprunError: no usable admin key, or unusable canary prompts.
            OSError: the port is taken, or the state folder cannot be written to.
        """
        self._base, self._folder, self._options, self._resident = base, folder, options, resident
        self._prompts = _own_prompts(options.canary_prompts, base)
        self._rebuild = RebuildFolder(folder.path, base)
        self._audit = AuditLog(folder.store)
        self._records = OperationRecords(folder.store)
        self._experiments = LiveExperiments(folder.store.salt(), time.time)
        self._keys = server_keys(options.admin_key_file, options.state, public=public_keys)
        self._listener = admin_server.bind(options.admin_host, options.admin_port)

    async def on_front(self, front: Front) -> Callable[[], Awaitable[None]]:
        """Start everything; returns what stops it."""
        async with contextlib.AsyncExitStack() as stack:
            control: Control | RebuildControl
            if front.engine is None:
                control = self._rebuild_control(front)
                stack.push_async_callback(self._records.written)
                await control.start()
            else:
                control = await self._control(front.engine, front.names)
                for problem in await control.start(self._resident):
                    logger.warning("at start: %s", problem)
                remember_resident(self._folder, self._options.resident)
            stack.push_async_callback(control.stop)
            calibration = experiments = None
            if front.engine is not None and isinstance(control, Control):
                calibration = await self._calibration(front.engine, control, stack)
                experiments = await stack.enter_async_context(
                    experimenting(
                        front.engine,
                        control,
                        self._folder.store,
                        self._experiments,
                        front.names,
                        self._options.experiment_interval,
                    )
                )
            prompts = self._options.prompts
            await stack.enter_async_context(
                KeptPrompts(
                    self._folder.path,
                    share=prompts.share,
                    most=prompts.most,
                    days=prompts.days,
                    redact=prompts.redact,
                ).running()
            )
            background = self._background(control, front.engine, calibration)
            metrics = live_metrics.LiveMetrics(
                control,
                calibration,
                background.jobs.newest,
                experiments.requests if experiments else None,
                experiments.service.newest if experiments else None,
            )
            await stack.enter_async_context(live_metrics.published(metrics))
            app = make_app(
                control,
                keys=background.keys(self._keys),
                audit=self._audit,
                roots=self._roots,
                metrics=metrics,
                jobs=background.jobs,
                calibration=calibration,
                experiments=experiments.service if experiments else None,
            )
            running = await admin_server.start(
                app, listener=self._listener, on_stop=app.state.events.close
            )
            stack.push_async_callback(running.stop)
            background.supervisor.start()
            stack.push_async_callback(background.supervisor.stop)
            logger.info("serving %s, state in %s", control.serving, self._folder.path)
            # None in rebuild mode: requests have no choice there.
            admission.install(experiments.routing if experiments else None)
            stack.callback(admission.install, None)
            return stack.pop_all().aclose
        raise AssertionError("unreachable")

    @property
    def _roots(self) -> tuple[Path, ...]:
        """Folders that requests may name files in."""
        files = self._folder.store.files
        return (*self._options.plan_roots, *default_roots(self._options.state), files)

    def _background(
        self,
        control: Control | RebuildControl,
        engine: VLLMLiveEngine | None,
        calibration: LiveCalibration | None,
    ) -> Background:
        serving: LiveBackground | NoLiveBackground = NoLiveBackground()
        if engine is not None and isinstance(control, Control):
            gate = BackgroundGate(engine.traffic)
            engine.gate = gate
            serving = LiveBackground(control.candidates, gate)
        return Background(
            self._folder.store,
            self._base,
            control,
            self._roots,
            admin_url=admin_server.local_url(self._listener),
            engine=serving,
            prompts=self._folder.path / PROMPTS,
            calibration=calibration,
        )

    async def _calibration(
        self, engine: VLLMLiveEngine, control: Control, stack: contextlib.AsyncExitStack
    ) -> LiveCalibration | None:
        """Statistics of live traffic, read until ``stack`` is closed."""
        options = self._options.statistics
        if not options.on:
            return None
        found = LiveCalibration(
            engine,
            control.directory,
            self._folder.path,
            self._folder.store.model,
            interval=options.interval,
            half_life=options.half_life,
        )
        await stack.enter_async_context(found.running())
        return found

    def restarting(self) -> AbstractContextManager[Path]:
        """Wraps the server's run; gives the checkpoint to serve, the base but in rebuild mode."""
        return restarting(self._rebuild)

    def close(self) -> None:
        """Give back what was taken, where the engine never came up."""
        self._listener.close()
        self._folder.close()

    def _rebuild_control(self, front: Front) -> RebuildControl:
        reason = front.reason or f"the rebuilt checkpoint {self._rebuild.state.serving!r}"
        logger.warning("variants need a restart here (rebuild mode): %s", reason)
        return RebuildControl(
            self._rebuild,
            front.names[0],
            reason=reason,
            answers=partial(public_health.answers, front.address),
            on_end=self._records,
        )

    async def _control(self, engine: VLLMLiveEngine, names: list[str]) -> Control:
        key = engine_key(engine.dtype, engine.ranks, engine.vllm_version, compiled=engine.compiled)
        return Control(
            names[0],
            names[1:],
            self._base,
            engine,
            self._folder,
            Canaries((*canary_prompts(engine.vocabulary), *self._prompts), key),
            fingerprint=self._folder.store.model,
            needed=self._experiments.needed_variants,
            memory_target=self._options.memory_target
            or await default_target(engine, self._folder.path),
        )


def _own_prompts(path: Path | None, base: Path) -> tuple[tuple[int, ...], ...]:
    """The operator's canary prompts, by the model's tokenizer."""
    if path is None:
        return ()
    from transformers import AutoTokenizer

    return read_prompts(path, AutoTokenizer.from_pretrained(base).encode)


async def default_target(engine: LiveEngine, folder: Path) -> int:
    """What is used at start; after a compact restart, with the rows of the start before.

    Else what was swapped out could never come back without ``--memory-target``.
    """
    memory, kv = await engine.memory(), await engine.kv()
    path = folder / ROWS_FILE
    before = int(path.read_text(encoding="ascii")) if path.exists() else 0
    rows = max(before, memory.base_rows)
    write_atomic(path, str(rows).encode())
    return total_bytes(memory, kv) - memory.base_rows + rows
