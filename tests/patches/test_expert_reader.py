from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from liveprune.patches import expert_reader
from liveprune.patches.expert_reader import ExpertReader
from liveprune.pruning.errors import CheckpointError, EngineError
from liveprune.pruning.model_spec import ModelSpec
from tests.checkpoints import edited, fused, tensors

Models = Callable[..., Path]


@pytest.fixture
def base(tiny_model: Models) -> Path:
    return tiny_model("mixtral")


def open_reader(
    model: Path, dtype: torch.dtype = torch.float32, rank: int = 0, ranks: int = 1
) -> ExpertReader:
    return ExpertReader(model, ModelSpec.from_path(model), dtype=dtype, tp_rank=rank, tp_size=ranks)


def expected(
    model: Path, layer: int, expert: int, dtype: torch.dtype, rank: int, ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """From whole tensors, read by the safetensors library; classic layout."""
    spec = ModelSpec.from_path(model)
    prefix = f"{spec.architecture.block_prefix(layer)}experts.{expert}."
    held = tensors(model)
    gate, up, down = (held[f"{prefix}{name}.weight"] for name in spec.architecture.experts)
    w13 = torch.cat([x.chunk(ranks, dim=0)[rank] for x in (gate, up)])
    return w13.to(dtype), down.chunk(ranks, dim=1)[rank].to(dtype).contiguous()


def same(found: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous() and torch.equal(a, b)
        for a, b in zip(found, right, strict=True)
    )


@pytest.mark.parametrize("layout", ["classic", "fused"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("family", "stored", "dtype"),
    [
        ("mixtral", "float32", torch.float32),
        ("mixtral", "float32", torch.bfloat16),
        ("qwen2_moe", "bfloat16", torch.bfloat16),
        ("qwen2_moe", "bfloat16", torch.float32),
        ("qwen3_moe", "float16", torch.bfloat16),
        ("deepseek_v2", "float32", torch.float16),
    ],
)
def test_reads_what_slicing_whole_tensors_gives(
    family: str,
    stored: str,
    dtype: torch.dtype,
    ranks: int,
    layout: str,
    tiny_model: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(expert_reader, "CHUNK_BYTES", 1000)  # several chunks, the last one short
    model = read = tiny_model(family, dtype=stored)
    spec = ModelSpec.from_path(model)
    if layout == "fused":
        read = edited(model, tmp_path / "fused", lambda held: fused(held, spec), shards=2)
    for rank in range(ranks):
        reader = open_reader(read, dtype, rank, ranks)
        for layer in spec.layers:
            assert reader.experts(layer.index) == layer.experts
            for expert in range(layer.experts):
                found = reader.read(layer.index, expert)
                assert tuple(tuple(x.shape) for x in found) == reader.shapes
                right = expected(model, layer.index, expert, dtype, rank, ranks)
                assert same(found, right), (layer.index, expert, rank)
        reader.close()


def test_one_large_read_where_nothing_is_converted(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 x 64 float32 for each of gate and up, one rank's half of them, and all of down."""
    sizes: list[int] = []
    original = expert_reader.read_into

    def counted(file: int, view: memoryview, start: int) -> None:
        sizes.append(len(view))
        original(file, view, start)

    monkeypatch.setattr(expert_reader, "read_into", counted)
    open_reader(base).read(0, 3)
    assert sizes == [48 * 64 * 4] * 3
    sizes.clear()
    open_reader(base, rank=1, ranks=2).read(0, 3)
    assert sizes == [24 * 64 * 4, 24 * 64 * 4, 64 * 48 * 4]


def test_reads_into_memory_that_is_there(base: Path) -> None:
    reader = open_reader(base)
    both = torch.full((3, *reader.shapes[0]), 7.0), torch.full((3, *reader.shapes[1]), 7.0)
    reader.read_into(1, 2, both[0][1], both[1][1])
    assert same((both[0][1], both[1][1]), expected(base, 1, 2, torch.float32, 0, 1))
    for tensor in both:
        assert bool((tensor[[0, 2]] == 7.0).all()), "neighbours stay untouched"


def test_many_threads_at_once(base: Path) -> None:
    reader = open_reader(base, torch.bfloat16)
    barrier = threading.Barrier(4)
    experts = [(layer, expert) for layer in range(3) for expert in range(8)]

    def read(part: int) -> list[bool]:
        barrier.wait()
        return [
            same(reader.read(*x), expected(base, *x, torch.bfloat16, 0, 1)) for x in experts[part:]
        ]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(found) for found in pool.map(read, range(4)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
def test_refuses_what_is_not_finite_by_name(
    name: str, value: float, base: Path, tmp_path: Path
) -> None:
    full = f"model.layers.1.block_sparse_moe.experts.5.{name}.weight"

    def damage(held: dict[str, torch.Tensor]) -> None:
        held[full][-1, -1] = value

    reader = open_reader(edited(base, tmp_path / "damaged", damage))
    reader.read(1, 4)
    with pytest.raises(CheckpointError, match=f"^{full}: found NaN or infinity in 1 of"):
        reader.read(1, 5)


def test_refuses_what_the_engines_type_cannot_hold(base: Path, tmp_path: Path) -> None:
    full = "model.layers.0.block_sparse_moe.experts.0.w2.weight"

    def enlarge(held: dict[str, torch.Tensor]) -> None:
        held[full][3, 4] = 70_000.0

    model = edited(base, tmp_path / "large", enlarge)
    assert open_reader(model).read(0, 0)[1][3, 4] == 70_000.0
    with pytest.raises(CheckpointError, match=f"^{full} as torch.float16: found NaN or infinity"):
        open_reader(model, torch.float16).read(0, 0)


def test_refuses_quantised_experts(base: Path, tmp_path: Path) -> None:
    def quantise(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v.to(torch.float8_e4m3fn) if ".experts." in k else v for k, v in held.items()}

    model = edited(base, tmp_path / "quantised", quantise)
    with pytest.raises(CheckpointError, match=r"experts.0.w1.weight: found a quantised expert"):
        open_reader(model)


def test_refuses_files_that_end_early_or_change(base: Path, tmp_path: Path) -> None:
    model = edited(base, tmp_path / "model", shards=1)
    file = model / "model.safetensors"
    reader = open_reader(model)
    size = file.stat().st_size
    os.truncate(file, size // 2)
    pattern = r"model.safetensors: model\.layers\.2\.\S+: weight file ended at byte \d+"
    with pytest.raises(CheckpointError, match=pattern):
        reader.read(2, 7)
    with file.open("r+b") as raw:
        raw.truncate(size)
    with pytest.raises(CheckpointError, match="written to since it was opened"):
        reader.read(2, 7)


def test_an_io_error_names_file_and_tensor(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_reader(base)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(expert_reader, "read_into", fail)
    with pytest.raises(CheckpointError, match=r"safetensors: \S+experts.1.w1.weight: .*Input/out"):
        reader.read(0, 1)


def test_a_replaced_file_is_read_as_it_was_opened(base: Path, tmp_path: Path) -> None:
    model = edited(base, tmp_path / "model")
    reader = open_reader(model)
    (model / "model.safetensors").unlink()
    assert same(reader.read(1, 1), expected(base, 1, 1, torch.float32, 0, 1))


def test_slices_and_experts_must_exist(base: Path) -> None:
    with pytest.raises(EngineError, match="rank 0 of 5 for 48 intermediate columns"):
        open_reader(base, ranks=5)
    with pytest.raises(EngineError, match="rank 2 of 2"):
        open_reader(base, rank=2, ranks=2)
    with pytest.raises(EngineError, match="layer 1: expert 8, expected 0 to 7"):
        open_reader(base).read(1, 8)


def test_says_where_an_expert_is(base: Path) -> None:
    found = open_reader(base).where(1, 6)
    assert found == "model.safetensors: model.layers.1.block_sparse_moe.experts.6.w1.weight"


def test_opens_each_shard_once_and_closes_it(base: Path, tmp_path: Path) -> None:
    model = edited(base, tmp_path / "sharded", shards=3)

    def descriptors() -> int:
        links = Path("/proc/self/fd").iterdir()
        return sum(str(model) in str(link.readlink()) for link in links if link.is_symlink())

    reader = open_reader(model)
    reader.read(0, 0)
    assert descriptors() == 3
    assert str(model) not in Path("/proc/self/maps").read_text(), "files are never mapped"
    reader.close()
    assert descriptors() == 0
