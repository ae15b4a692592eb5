"""Live variants in the server's process: between vLLM's engine and its first request."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from liveprune.patches import admission
from liveprune.patches.live_engine import VLLMLiveEngine
from liveprune.server import admin_server, live_metrics
from liveprune.server.admin_api import make_app
from liveprune.server.admin_key import server_keys
from liveprune.server.allowed_paths import default_roots
from liveprune.server.audit import AUDIT_FILE, AuditLog
from liveprune.server.control import Control
from liveprune.server.golden import Canaries, canary_prompts, engine_key
from liveprune.server.live_options import LiveOptions
from liveprune.server.state_folder import StateFolder

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
            LiveprunError: no usable admin key.
            OSError: the port is taken, or the state folder cannot be written to.
        """
        self._base, self._folder, self._options, self._resident = base, folder, options, resident
        self._audit = AuditLog(options.state / AUDIT_FILE)
        self._keys = server_keys(options.admin_key_file, options.state, public=public_keys)
        self._listener = admin_server.bind(options.admin_host, options.admin_port)

    async def on_engine(
        self, engine: VLLMLiveEngine | None, names: list[str]
    ) -> Callable[[], Awaitable[None]]:
        """Start everything; returns what stops it."""
        if engine is None:
            self.close()
            return _nothing
        async with contextlib.AsyncExitStack() as stack:
            control = self._control(engine, names)
            stack.push_async_callback(control.stop)
            for problem in await control.start(self._resident):
                logger.warning("not restored: %s", problem)
            metrics = live_metrics.LiveMetrics(control)
            await stack.enter_async_context(live_metrics.published(metrics))
            app = make_app(
                control,
                keys=self._keys,
                audit=self._audit,
                roots=(*self._options.plan_roots, *default_roots(self._options.state)),
                metrics=metrics,
            )
            running = await admin_server.start(app, listener=self._listener)
            stack.push_async_callback(running.stop)
            admission.install(control.directory)
            stack.callback(admission.install, None)
            return stack.pop_all().aclose
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Give back what was taken, where the engine never came up."""
        self._listener.close()
        self._folder.close()

    def _control(self, engine: VLLMLiveEngine, names: list[str]) -> Control:
        key = engine_key(engine.dtype, engine.ranks, engine.vllm_version)
        return Control(
            names[0],
            names[1:],
            self._base,
            engine,
            self._folder,
            Canaries(canary_prompts(engine.vocabulary), key),
            memory_target=self._options.memory_target,
        )


async def _nothing() -> None:
    return None
