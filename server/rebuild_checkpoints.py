"""The pruned checkpoints of rebuild mode: written beside the running server, and deleted."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

from liveprune.pruning.checkpoint.inspect import inspect
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from liveprune.server.operations import Operation
from liveprune.server.rebuild_state import Built, RebuildFolder, RebuildState
from liveprune.server.rebuild_worker import CheckpointWorker
from liveprune.server.variant import Variant


class RebuiltCheckpoints:
    """One folder for each plan, however many variants have it."""

    def __init__(self, folder: RebuildFolder, spec: ModelSpec) -> None:
        """``spec``: of the base model."""
        self._folder = folder
        self._spec = spec
        self.building: dict[str, Built] = {}
        """What is under way, by tag."""

    def tidy(self) -> None:
        """Delete what no variant has: checkpoints that were not complete, or not recorded."""
        wanted = self._digests(self._folder.state)
        if self._folder.checkpoints.is_dir():
            for path in self._folder.checkpoints.iterdir():
                if path.name not in wanted:
                    shutil.rmtree(path, ignore_errors=True)

    def cost(self, plan: Plan) -> int:
        """About how many bytes the checkpoint takes: the experts shrink, the rest stays.

        Raises:
            CheckpointError: the base model's files are damaged, or not safetensors.
        """
        base = inspect(self._folder.base)
        stored = {layer.layer: layer.bytes or 0 for layer in base.layers}
        experts = sum(
            stored[layer.layer] * layer.kept_experts // layer.experts for layer in plan.layers
        )
        return (base.total_bytes or 0) - sum(stored.values()) + experts

    async def build(self, operation: Operation, tag: str, plan: Plan) -> None:
        """Write the checkpoint of a plan, unless it is there, and record the variant.

        Interrupted, it leaves nothing behind; where it was complete already, it is recorded.

        Raises:
            CheckpointError: it could not be written.
            OSError: it could not be recorded.
        """
        experts, top_k = Variant(tag, plan).counts(self._spec)
        self.building[tag] = Built(plan.digest, experts, top_k, bytes=0)
        output = self._folder.checkpoints / plan.digest
        worker = CheckpointWorker(self._folder.base, plan, output)

        def progress(done: int, total: int) -> None:
            operation.bytes_done, operation.bytes_total = done, total

        def write() -> None:
            if plan.digest not in self._digests(self._folder.state):
                shutil.rmtree(output, ignore_errors=True)  # left by a removal that failed
                worker.run(progress)
            built = replace(self.building[tag], bytes=_size(output))
            self._folder.update(lambda now: replace(now, variants={**now.variants, tag: built}))

        writing = asyncio.ensure_future(asyncio.to_thread(write))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            worker.kill()
            await asyncio.wait({writing})
            if writing.exception() is not None:
                raise
        finally:
            del self.building[tag]

    async def delete(self, operation: Operation, tag: str) -> None:
        """Forget a variant, and delete its checkpoint if no other has it; to the end, once begun.

        Raises:
            CheckpointError: it is forgotten, but could not be deleted; the next start tries again.
            OSError: the variant could not be forgotten.
        """
        deleting = asyncio.ensure_future(asyncio.to_thread(self._delete, operation, tag))
        try:
            await asyncio.shield(deleting)
        except asyncio.CancelledError:
            await asyncio.wait({deleting})
            deleting.result()

    def _delete(self, operation: Operation, tag: str) -> None:
        def forget(now: RebuildState) -> RebuildState:
            variants = {other: built for other, built in now.variants.items() if other != tag}
            previous = None if now.previous == tag else now.previous
            return replace(now, variants=variants, previous=previous)

        gone = self._folder.state.variants[tag]
        if gone.digest in self._digests(self._folder.update(forget)):
            operation.notes.append("its checkpoint stays: another variant has the same plan")
            return
        path = self._folder.checkpoints / gone.digest
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            operation.notes.append("its checkpoint was gone already")
        except OSError as error:
            raise CheckpointError(
                f"{path}: no longer a variant's, but not deleted: {error}"
            ) from error
        else:
            operation.freed_bytes = gone.bytes
            operation.notes.append("the bytes were freed on disk")

    @staticmethod
    def _digests(state: RebuildState) -> set[str]:
        return {built.digest for built in state.variants.values()}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
