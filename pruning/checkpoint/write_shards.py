"""Carrying out a rewrite: shards are written by a few threads, and synced as they grow."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from liveprune.pruning.checkpoint.merge import Merge, Span
from liveprune.pruning.checkpoint.neuron_merge import NeuronMerge
from liveprune.pruning.checkpoint.rewrite import Literal, MergedRow, Output, Part
from liveprune.pruning.checkpoint.shard_writer import ShardWriter

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""
MAX_WORKERS = 4
"""Threads that copy and merge, and threads that sync; more only contend for the disk."""
REPORT_SECONDS = 0.2


def write_shards(
    folder: Path,
    shards: Mapping[str, Sequence[Output]],
    sources: Iterable[Path],
    progress: Progress | None = None,
) -> None:
    """Write all shards: the copies of each are one task, and each merge is one.

    Args:
        folder: where the files are made.
        shards: tensors by file name.
        sources: the weight files that their parts name.
        progress: called with (bytes written, bytes in all), on this thread.
    """
    total = sum(tensor.size for tensors in shards.values() for tensor in tensors)
    stop = threading.Event()
    with ExitStack() as stack:
        flusher = ThreadPoolExecutor(MAX_WORKERS, "flush")
        stack.callback(flusher.shutdown, cancel_futures=True)
        files: dict[Path, int] = {}
        for path in sources:
            files[path] = os.open(path, os.O_RDONLY)
            stack.callback(os.close, files[path])
        targets: dict[Merge | NeuronMerge, dict[int, tuple[ShardWriter, int]]] = {}
        tasks: list[Callable[[], None]] = []
        writers = []
        for name, tensors in shards.items():
            writer = stack.enter_context(ShardWriter(folder / name, tensors, flusher, stop))
            writers.append(writer)
            tasks.append(partial(_copy, writer, tensors, files))
            for part, offset in _parts(writer, tensors):
                if isinstance(part, MergedRow):
                    targets.setdefault(part.merge, {})[part.row] = (writer, offset)
        tasks.extend(partial(_merge, merge, rows, files) for merge, rows in targets.items())

        def report() -> None:
            if progress is not None:
                progress(min(sum(writer.written for writer in writers), total), total)

        _run(tasks, stop, report)


def _run(
    tasks: Sequence[Callable[[], None]], stop: threading.Event, report: Callable[[], None]
) -> None:
    """Run ``tasks`` on a few threads; ``report`` and interrupts happen on this one."""
    workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers, "apply") as pool:
        try:
            waiting = {pool.submit(task) for task in tasks}
            while waiting:
                done, waiting = wait(waiting, REPORT_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                report()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _parts(writer: ShardWriter, tensors: Sequence[Output]) -> Iterator[tuple[Part, int]]:
    """Each part of each tensor, and the byte of the file at which it belongs."""
    for tensor in tensors:
        offset = writer.offsets[tensor.name]
        for part in tensor.parts:
            yield part, offset
            offset += part.size


def _copy(writer: ShardWriter, tensors: Sequence[Output], files: Mapping[Path, int]) -> None:
    for part, offset in _parts(writer, tensors):
        if isinstance(part, Span):
            writer.copy(files[part.path], part.start, offset, part.size)
        elif isinstance(part, Literal):
            writer.write(part.data, offset)


def _merge(
    merge: Merge | NeuronMerge,
    rows: Mapping[int, tuple[ShardWriter, int]],
    files: Mapping[Path, int],
) -> None:
    for start, chunks in merge.chunks(files):
        for row, data in enumerate(chunks):
            writer, offset = rows[row]
            writer.write(data, offset + start)
