"""``liveprune serve`` in rebuild mode without vLLM: a loop that ends with SIGTERM.

At its first start it adds the variant ``small`` and swaps to it. Each start prints a JSON line.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from liveprune.server.rebuild import RebuildControl
from liveprune.server.rebuild_restart import restarting
from liveprune.server.rebuild_state import RebuildFolder


async def serve(folder: RebuildFolder, model: Path, plan: Path) -> None:
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)

    async def answers() -> bool:
        return True

    control = RebuildControl(folder, "m", reason="a test", answers=answers, poll=0.01)
    await control.start()
    await until(lambda: control._settled)
    if folder.state.operation is None:
        added = await control.add("small", plan)
        await until(lambda: added.finished is not None)
        operation = await control.swap("small")
        await terminated.wait()
    else:
        (operation,) = control.operations()
    facts = {"pid": os.getpid(), "model": str(model), "operation": operation.to_json()}
    print(json.dumps(facts), flush=True)
    await control.stop()


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - no event for it
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    state = RebuildFolder(Path(sys.argv[1]), Path(sys.argv[2]))
    with restarting(state) as served:
        asyncio.run(serve(state, served, Path(sys.argv[3])))
