from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liveprune.patches import expert_reader
from liveprune.patches.background_thread import NICE
from liveprune.patches.expert_packing import Packing
from liveprune.patches.expert_reader import ExpertReader
from liveprune.patches.row_filler import MergeJob, RowFiller, RowJob
from liveprune.pruning.errors import EngineError
from liveprune.pruning.model_spec import ModelSpec
from tests.checkpoints import edited, fused
from tests.patches.filler_world import EXPERTS, TIMEOUT, FakeRows, Setup, packed

Models = Callable[..., Path]


@pytest.fixture
def model(tiny_model: Models) -> Path:
    """Mixtral, 3 layers of 8 experts, intermediate size 48: padded to 64."""
    return tiny_model("mixtral")


def assert_rows(setup: Setup, model: Path, wanted: dict[int, set[int]], **slices: int) -> None:
    """Exactly ``wanted`` rows per layer hold their own expert, the others nothing."""
    for layer in setup.layers:
        rows, right = setup.rows[layer], packed(model, layer, setup.reader.dtype, **slices)
        assert rows.written == rows.resident == wanted.get(layer, set())
        for row in rows.resident:
            for found, expected in zip((rows.w13, rows.w2), right, strict=True):
                assert torch.equal(found[row], expected[row]), (layer, row)


@pytest.mark.parametrize("layout", ["classic", "fused"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("family", "dtype"), [("mixtral", torch.float32), ("qwen2_moe", torch.bfloat16)]
)
def test_rows_are_what_vllm_would_have_made_and_others_stay_untouched(
    family: str, dtype: torch.dtype, ranks: int, layout: str, tiny_model: Models, tmp_path: Path
) -> None:
    model = read = tiny_model(family)
    if layout == "fused":
        spec = ModelSpec.from_path(model)
        read = edited(model, tmp_path / "fused", lambda held: fused(held, spec))
    for rank in range(ranks):
        setup = Setup(read, dtype, rank, ranks)
        jobs = [RowJob(0, e, e) for e in (1, 3, 6)] + [RowJob(2, e, e) for e in range(EXPERTS)]
        assert setup.run(jobs) == "ready"
        wanted = {0: {1, 3, 6}, 2: set(range(EXPERTS))}
        assert_rows(setup, model, wanted, rank=rank, ranks=ranks)


def test_rows_that_are_not_packed(model: Path) -> None:
    setup = Setup(model, packing=Packing(64, 48, 48))
    assert setup.run([RowJob(1, e, e) for e in (2, 7)]) == "ready"
    rows = setup.rows[1]
    assert rows.written == {2, 7}
    for expert in (2, 7):
        w13, w2 = setup.reader.read(1, expert)
        assert torch.equal(rows.w13[expert], w13)
        assert torch.equal(rows.w2[expert], w2)


def test_a_spare_row_takes_a_copy_of_an_expert(model: Path) -> None:
    setup = Setup(model)
    assert setup.run([RowJob(1, 9, 4), RowJob(1, 4, 4)]) == "ready"
    rows = setup.rows[1]
    assert rows.written == {4, 9}
    assert torch.equal(rows.w13[9], rows.w13[4])


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads(threads: int, model: Path) -> None:
    setup = Setup(model, threads=threads)
    assert setup.run([RowJob(x, e, e) for x in setup.layers for e in range(7)]) == "ready"
    assert_rows(setup, model, {layer: set(range(7)) for layer in setup.layers})


def test_progress_counts_the_bytes_of_rows(model: Path) -> None:
    """w13 [2 * 64, 64] and w2 [64, 64] in float32: 48 KiB a row."""
    setup = Setup(model)
    task = setup.filler.start([RowJob(0, 1, 1), RowJob(2, 5, 5)], [MergeJob(1, (8,), unit(2))])
    found = task.wait(TIMEOUT)
    row = (2 * 64 * 64 + 64 * 64) * 4
    assert (found.phase, found.bytes_done, found.bytes_total) == ("ready", 4 * row, 4 * row)
    assert not task.running
    task.cancel()
    assert task.progress().phase == "ready", "cancelled too late"
    assert setup.resident() == [{1}, {8}, {5}]


def test_nothing_to_do_is_ready(model: Path) -> None:
    setup = Setup(model)
    assert setup.run([]) == "ready"
    assert setup.resident() == [set(), set(), set()]


def unit(*experts: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.eye(EXPERTS, dtype=np.float32)[list(experts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_rows_are_linear_combinations(dtype: torch.dtype, model: Path) -> None:
    setup = Setup(model, dtype)
    coefficients = np.random.default_rng(3).normal(size=(3, EXPERTS)).astype(np.float32)
    coefficients[:, [2, 5]] = 0
    merges = [MergeJob(1, (8, 11, 9), coefficients), MergeJob(2, (10,), coefficients[:1])]
    assert setup.run([], merges) == "ready"
    assert setup.resident() == [set(), {8, 9, 11}, {10}], "sources had memory only meanwhile"
    assert setup.written() == setup.resident()
    assert setup.rows[1].most == 3 + 6, "experts without a coefficient are not read"
    for merge in merges:
        rows, right = setup.rows[merge.layer], packed(model, merge.layer, dtype)
        weights = torch.from_numpy(merge.coefficients).double()
        for found, source in zip((rows.w13, rows.w2), right, strict=True):
            exact = torch.einsum("ji,iab->jab", weights, source.double())
            sizes = torch.einsum("ji,iab->jab", weights.abs(), source.double().abs())
            # Six float32 products and sums, then one rounding to the rows' type.
            bound = 8 * 2.0**-24 * sizes + torch.finfo(dtype).eps / 2 * exact.abs()
            assert bool(((found[list(merge.rows)].double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_hot_merges_are_copies(dtype: torch.dtype, model: Path) -> None:
    setup = Setup(model, dtype)
    assert setup.run([], [MergeJob(0, (8, 9), unit(6, 1))]) == "ready"
    for found, right in zip(
        (setup.rows[0].w13, setup.rows[0].w2), packed(model, 0, dtype), strict=True
    ):
        assert torch.equal(found[[8, 9]], right[[6, 1]])


def test_a_merge_of_nothing_is_zero(model: Path) -> None:
    setup = Setup(model)
    assert setup.run([], [MergeJob(0, (8,), np.zeros((1, EXPERTS), np.float32))]) == "ready"
    assert not setup.rows[0].w13[8].any()


def test_sources_that_are_wanted_or_were_there_stay(model: Path) -> None:
    setup = Setup(model)
    assert setup.run([RowJob(0, 1, 1)]) == "ready"
    merge = MergeJob(0, (8,), unit(1) + unit(2) + unit(3) + unit(4))
    assert setup.run([RowJob(0, 2, 2)], [merge], [(0, 3)]) == "ready"
    assert setup.resident() == [{1, 2, 3, 8}, set(), set()]
    assert setup.written() == setup.resident()


def test_rows_that_were_there_are_not_written_again(model: Path) -> None:
    setup = Setup(model)
    rows = setup.rows[0]
    assert setup.run([RowJob(0, 1, 1), RowJob(0, 5, 5)]) == "ready"
    rows.w13[1, 0, 0] += 1.0
    before = rows.w13[1].clone()
    error = setup.run([RowJob(0, 1, 1), RowJob(0, 2, 2)])
    assert error.startswith("layer 0, row 1: checksum is"), "verified, not repaired"
    assert torch.equal(rows.w13[1], before)
    assert setup.resident()[0] == {1, 5}, "row 2 was this task's, row 1 was not"


def test_needed_base_rows_are_filled_and_spare_ones_must_be_there(model: Path) -> None:
    setup = Setup(model)
    assert setup.run([], [MergeJob(1, (9,), unit(0, 3).sum(0, keepdims=True))]) == "ready"
    assert setup.run([], [], [(1, 9), (1, 4)]) == "ready"
    assert setup.resident()[1] == {4, 9}
    error = setup.run([RowJob(1, 5, 5)], [], [(1, 10)])
    assert error == "layer 1: rows [10] have no memory, expected rows that were filled"
    setup.rows[1].commit([10])
    error = setup.run([], [], [(1, 10)])
    assert error.startswith("layer 1, row 10: checksum is ")
    assert error.endswith("expected nothing, it was never filled")


def test_spare_rows_in_use_are_not_written(model: Path) -> None:
    setup = Setup(model)
    merge = MergeJob(1, (9,), unit(0))
    assert setup.run([], [merge]) == "ready"
    for again in ([], [merge]), ([RowJob(1, 9, 3)], []):
        assert setup.run(*again) == "layer 1: rows [9] are in use, expected free spare rows"
    assert setup.resident()[1] == {9}


# Checksums


def test_checksums_are_those_of_the_bytes(model: Path) -> None:
    setup = Setup(model)
    assert setup.run([RowJob(0, 2, 2)], [MergeJob(0, (9,), unit(2) * 2)]) == "ready"
    for row in (2, 9):
        rows, checks = setup.rows[0], setup.filler.checks
        data = rows.w13[row].numpy().tobytes() + rows.w2[row].numpy().tobytes()
        assert checks.expected(0, row) == checks.measure(rows, row) == zlib.crc32(data)


def flip(rows: FakeRows, row: int) -> None:
    """One bit of one byte."""
    rows.w2[row].view(torch.uint8)[3, 5] ^= 1


def test_a_row_that_changes_after_it_was_written_fails_the_task(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(model)
    record = setup.filler.checks.record

    def record_and_damage(layer: int, row: int, checksum: int) -> None:
        record(layer, row, checksum)
        if (layer, row) == (1, 3):
            flip(setup.rows[1], 3)

    monkeypatch.setattr(setup.filler.checks, "record", record_and_damage)
    task = setup.filler.start([RowJob(x, e, e) for x in (0, 1) for e in (2, 3)])
    found = task.wait(TIMEOUT)
    right = setup.filler.checks.expected(1, 3)
    assert found.phase == "failed"
    assert found.error.startswith("layer 1, row 3: checksum is ")
    assert found.error.endswith(f", expected {right:08x}")
    assert f"{right:08x}" not in found.error.split(",")[1]
    assert setup.resident() == setup.written() == [set(), set(), set()]


def test_a_needed_row_that_changed_fails_the_task(model: Path) -> None:
    setup = Setup(model)
    assert setup.run([RowJob(0, 2, 2), RowJob(0, 3, 3)]) == "ready"
    flip(setup.rows[0], 3)
    error = setup.run([RowJob(1, 1, 1)], [], [(0, 2), (0, 3)])
    assert error.startswith("layer 0, row 3: checksum is ")
    assert setup.resident() == [{2, 3}, set(), set()]


def test_filling_again_must_give_the_same(model: Path, tmp_path: Path) -> None:
    copy = edited(model, tmp_path / "model")
    setup, rows = Setup(copy), None
    rows = setup.rows[1]
    jobs = [RowJob(1, 4, 4), RowJob(1, 5, 5)]
    assert setup.run(jobs) == "ready"
    rows.release([4, 5])
    assert setup.run(jobs) == "ready"
    rows.release([4, 5])
    file = copy / "model.safetensors"
    state = file.stat()
    name = "model.layers.1.block_sparse_moe.experts.5.w1.weight"
    entry = expert_reader.read_checkpoint(copy).tensors[name]
    with file.open("r+b") as raw:
        raw.seek(entry.start + 40)
        raw.write(b"\0\0")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # as damage on the disk would
    error = setup.run(jobs)
    assert error.startswith("layer 1, expert 5: checksum is ")
    assert error.endswith(f"model.safetensors: {name}")
    assert setup.resident()[1] == set()
    assert setup.run(jobs[:1]) == "ready", "the other expert is still right"


def test_a_spare_row_may_hold_something_else_next_time(model: Path) -> None:
    setup = Setup(model)
    for expert in (1, 2):
        assert setup.run([], [MergeJob(1, (8,), unit(expert))]) == "ready"
        setup.rows[1].release([8])
        setup.filler.checks.forget(1, [8])
        assert setup.filler.checks.expected(1, 8) is None


# Failures


class Failing(ExpertReader):
    """Raises ``error`` for expert 5 of layer 1."""

    error: Exception = OSError(5, "Input/output error")

    def read_into(self, layer: int, expert: int, w13: torch.Tensor, w2: torch.Tensor) -> None:
        if (layer, expert) == (1, 5):
            w13.fill_(3.0)
            raise self.error
        super().read_into(layer, expert, w13, w2)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("no memory\nat some place"), "RuntimeError: no memory"),
        (EngineError("expert 5 is gone"), "expert 5 is gone"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_thread_ends_all_and_releases_all(
    threads: int, error: Exception, text: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "error", error)
    setup = Setup(model, reader=Failing, threads=threads)
    assert setup.run([RowJob(0, 7, 7)]) == "ready"
    jobs = [RowJob(x, e, e) for x in setup.layers for e in range(7)]
    found = setup.filler.start(jobs, [MergeJob(2, (8,), unit(1))]).wait(TIMEOUT)
    assert (found.phase, found.error) == ("failed", f"layer 1, expert 5: {text}")
    assert setup.resident() == setup.written() == [{7}, set(), set()]
    assert setup.filler.claimed(1) == frozenset()
    assert setup.run([RowJob(2, 1, 1)]) == "ready", "the filler goes on"


def test_a_file_that_ends_early(model: Path, tmp_path: Path) -> None:
    copy = edited(model, tmp_path / "model")
    setup = Setup(copy)
    assert setup.run([RowJob(0, 0, 0)]) == "ready"
    os.truncate(copy / "model.safetensors", 100_000)
    error = setup.run([RowJob(2, e, e) for e in range(EXPERTS)])
    assert "weight file ended at byte" in error
    assert "model.layers.2.block_sparse_moe.experts." in error
    assert setup.resident() == [{0}, set(), set()]


def test_no_memory_for_rows(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(model)
    original = FakeRows.commit

    def commit(self: FakeRows, rows: Collection[int]) -> None:
        original(self, rows)
        if self is setup.rows[2]:
            raise EngineError("no memory left")

    monkeypatch.setattr(FakeRows, "commit", commit)
    assert setup.run([RowJob(x, 1, 1) for x in setup.layers]) == "no memory left"
    assert setup.resident() == [set(), set(), set()]


@pytest.mark.parametrize("started", [0, 1])
def test_no_threads(started: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None at all, or none beside the first."""
    setup, count = Setup(model, threads=2), 0

    def start(self: threading.Thread, original: Any = threading.Thread.start) -> None:
        nonlocal count
        count += 1
        if count > started:
            raise RuntimeError("can't start new thread")
        original(self)

    jobs = [RowJob(0, e, e) for e in range(EXPERTS)]
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        if started:
            assert setup.run(jobs) == "RuntimeError: can't start new thread"
        else:
            with pytest.raises(EngineError, match="no thread to be had: can't start"):
                setup.filler.start(jobs)
    assert setup.resident() == [set(), set(), set()]
    assert setup.filler.claimed(0) == frozenset()
    assert setup.run(jobs) == "ready"


def test_rows_that_cannot_be_released_are_reported(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(model, reader=Failing)

    def release(self: FakeRows, rows: Collection[int]) -> int:
        raise EngineError("pages are locked")

    monkeypatch.setattr(FakeRows, "release", release)
    error = setup.run([RowJob(1, 5, 5)])
    assert error.startswith("layer 1, expert 5: OSError")
    assert error.endswith("(and: pages are locked)")


def test_sums_beyond_the_range_of_the_type(tiny_model: Models) -> None:
    setup = Setup(tiny_model("mixtral", dtype="float16"), torch.float16)
    error = setup.run([], [MergeJob(0, (8,), unit(1) * 1e6)])
    assert error.startswith("layer 0, rows [8]: merged values reach -")
    assert error.endswith("expected at most 65504 in torch.float16")
    assert setup.resident() == [set(), set(), set()]


def test_a_source_released_meanwhile_fails_the_merge(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(model)
    assert setup.run([RowJob(0, 1, 1)]) == "ready"
    record = setup.filler.checks.record

    def record_and_release(layer: int, row: int, checksum: int) -> None:
        record(layer, row, checksum)
        if row == 8:
            setup.rows[0].release([1])

    monkeypatch.setattr(setup.filler.checks, "record", record_and_release)
    error = setup.run([], [MergeJob(0, (8,), unit(1) + unit(2))])
    assert error == "layer 0: rows [1] were released while they were being merged"
    assert setup.resident()[0] == set()


@pytest.mark.parametrize(
    ("jobs", "merges", "needed", "message"),
    [
        ([RowJob(7, 0, 0)], [], [], r"found layers \[7\], expected some of \[0, 1, 2\]"),
        ([RowJob(0, 12, 0)], [], [], r"layer 0: found rows \[12\], expected 0 to 11"),
        ([], [], [(2, -1)], r"layer 2: found rows \[-1\], expected 0 to 11"),
        ([RowJob(0, 3, 4)], [], [], "layer 0: found expert 4 for row 3"),
        ([RowJob(0, 9, 8)], [], [], "layer 0: found expert 8 for row 9, expected one of 8"),
        ([RowJob(0, 1, 1)] * 2, [], [], r"layer 0: found rows \[1\] twice"),
        ([RowJob(0, 9, 1)], [MergeJob(0, (9,), unit(1))], [], r"found rows \[9\] twice"),
        ([], [MergeJob(1, (8, 9), unit(1))], [], r"found float32 coefficients \(1, 8\)"),
        ([], [MergeJob(1, (8,), np.eye(8)[:1])], [], "found float64 coefficients"),
        ([], [MergeJob(1, (3,), unit(1))], [], r"found merges into rows \[3\]"),
    ],
)
def test_impossible_jobs_are_refused_at_once(
    jobs: Any, merges: Any, needed: Any, message: str, model: Path
) -> None:
    setup = Setup(model)
    with pytest.raises(EngineError, match=message):
        setup.filler.start(jobs, merges, needed)
    assert setup.run([RowJob(0, 1, 1)]) == "ready"


def test_rows_of_another_layout_are_refused(model: Path) -> None:
    setup = Setup(model)
    other = Packing(64, 48, 96, isa="vec")
    message = r"layer 0: rows are .*, expected .* for experts of"
    with pytest.raises(EngineError, match=message):
        RowFiller(setup.reader, {0: other}, {0: setup.rows[0]})
    rows = FakeRows(setup.packing, torch.float16)
    with pytest.raises(EngineError, match=message):
        RowFiller(setup.reader, {0: setup.packing}, {0: rows})


# Order, cancelling, ownership


class Held(ExpertReader):
    """Stops in expert 5 until ``go_on``; notes who reads what, and how."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.read_experts: list[tuple[int, int]] = []

    def read_into(self, layer: int, expert: int, w13: torch.Tensor, w2: torch.Tensor) -> None:
        self.read_experts.append((layer, expert))
        if expert == 5:
            self.reached.set()
            assert self.go_on.wait(TIMEOUT)
        super().read_into(layer, expert, w13, w2)


@contextmanager
def held(model: Path, threads: int = 1) -> Iterator[tuple[Setup, Held]]:
    setup = Setup(model, reader=Held, threads=threads)
    assert isinstance(setup.reader, Held)
    try:
        yield setup, setup.reader
    finally:
        setup.reader.go_on.set()


@pytest.mark.parametrize("threads", [1, 2])
def test_cancelling_ends_after_the_expert_at_hand(threads: int, model: Path) -> None:
    with held(model, threads) as (setup, reader):
        jobs = [RowJob(0, e, e) for e in ([5, 6, 7] if threads == 1 else [5])]
        task = setup.filler.start(jobs, [MergeJob(1, (8,), unit(2))])
        assert reader.reached.wait(TIMEOUT)
        task.cancel()
        assert task.progress().phase == "filling"
        assert setup.filler.claimed(0) == {job.row for job in jobs}, "until it is over"
        reader.go_on.set()
        assert task.wait(TIMEOUT).phase == "cancelled"
    assert reader.read_experts == [(0, 5)]
    assert setup.resident() == setup.written() == [set(), set(), set()]
    assert setup.filler.claimed(0) == frozenset()


def test_tasks_take_turns_and_read_nothing_twice(model: Path) -> None:
    with held(model) as (setup, reader):
        first = setup.filler.start([RowJob(0, 5, 5)])
        second = setup.filler.start([RowJob(0, 5, 5), RowJob(0, 6, 6)])
        third = setup.filler.start([RowJob(0, 7, 7)])
        assert reader.reached.wait(TIMEOUT)
        third.cancel()
        assert third.wait(TIMEOUT).phase == "cancelled", "before its turn"
        assert (first.running, second.running) == (True, True)
        assert setup.resident()[0] == {5}
        reader.go_on.set()
        assert second.wait(TIMEOUT).phase == "ready"
        assert not first.running
    assert reader.read_experts == [(0, 5), (0, 6)]
    assert_rows(setup, model, {0: {5, 6}})


def test_a_row_that_is_there_for_a_merge_only_is_no_row_to_rely_on(model: Path) -> None:
    with held(model) as (setup, reader):
        setup.filler.start([], [MergeJob(0, (8,), unit(5) * 2)])
        assert reader.reached.wait(TIMEOUT)
        assert setup.resident()[0] == {5, 8}
        assert setup.filler.claimed(0) == {5, 8}
        assert setup.filler.claimed(1) == frozenset()
        # Another variant needs row 5, and finds it with memory.
        other = setup.filler.start([], [], [(0, 5)])
        reader.go_on.set()
        assert other.wait(TIMEOUT).phase == "ready"
    assert setup.resident()[0] == {5, 8}
    right = packed(model, 0, torch.float32)
    assert torch.equal(setup.rows[0].w13[5], right[0][5])
    assert torch.equal(setup.rows[0].w13[8], right[0][5] * 2)


def test_a_cancelled_task_takes_no_row_from_the_next(model: Path) -> None:
    with held(model) as (setup, reader):
        first, second = (setup.filler.start([RowJob(0, 5, 5)]) for _ in range(2))
        assert reader.reached.wait(TIMEOUT)
        first.cancel()
        reader.go_on.set()
        assert first.wait(TIMEOUT).phase == "cancelled"
        assert second.wait(TIMEOUT).phase == "ready"
    assert_rows(setup, model, {0: {5}})


def test_resident_rows_change_under_the_owners_lock_only(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = threading.Lock()
    for name in ("commit", "release"):
        original = getattr(FakeRows, name)

        def change(self: FakeRows, rows: Collection[int], original: Any = original) -> Any:
            assert lock.locked()
            return original(self, rows)

        monkeypatch.setattr(FakeRows, name, change)
    setup = Setup(model, reader=Failing, protect=lambda: lock)
    assert setup.run([RowJob(1, 1, 1)], [MergeJob(0, (8,), unit(3))]) == "ready"
    assert setup.run([RowJob(1, 5, 5)]).startswith("layer 1, expert 5: OSError")
    assert not lock.locked()
    assert setup.resident() == [{8}, {1}, set()]


def test_the_end_of_the_process_ends_the_task_first(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    monkeypatch.setattr("atexit.unregister", at_exit.remove)
    with held(model) as (setup, reader):
        task = setup.filler.start([RowJob(0, 5, 5), RowJob(0, 6, 6)])
        assert reader.reached.wait(TIMEOUT)
        (end,) = at_exit
        reader.go_on.set()
        end()
        assert task.progress().phase in ("cancelled", "ready")
        assert not task.running
    assert setup.run([RowJob(0, 1, 1)]) == "ready"
    assert at_exit == [], "tasks that are over are forgotten"


def test_the_threads_give_way_to_the_engines(model: Path) -> None:
    found: list[tuple[int, int]] = []

    class Watched(ExpertReader):
        def read_into(self, *arguments: Any) -> None:
            nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            found.append((nice, torch.get_num_threads()))
            super().read_into(*arguments)

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    setup = Setup(model, reader=Watched, threads=2)
    assert setup.run([RowJob(0, e, e) for e in range(EXPERTS)]) == "ready"
    assert found == [(max(NICE, before), 1)] * EXPERTS
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
