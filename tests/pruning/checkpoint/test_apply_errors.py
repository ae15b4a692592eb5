"""Every failure of apply: a clear error, and nothing left on the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from liveprune.pruning.checkpoint import apply, shard_writer
from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.errors import CheckpointError, PlanError
from liveprune.pruning.plan import Plan
from tests.checkpoints import edited, identity_plan, make_plan, merge_plan

TinyModel = Callable[..., Path]
FOUR = [(0, 3, 4, 6)]
EXPERT = "model.layers.1.block_sparse_moe.experts.5.w2.weight"


@pytest.fixture
def base(tiny_model: TinyModel) -> Path:
    return tiny_model("mixtral")


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """An output path whose parent must be left empty."""
    parent = tmp_path / "outputs"
    parent.mkdir()
    yield parent / "out"
    assert list(parent.iterdir()) == []


def refuse(model: Path, plan: Plan, target: Path, match: str, kind: type = CheckpointError) -> None:
    with pytest.raises(kind, match=match):
        apply_plan(model, plan, target)


def test_missing_shard(base: Path, tmp_path: Path, target: Path) -> None:
    model = edited(base, tmp_path / "m", shards=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    refuse(model, make_plan(base, FOUR), target, r"model-00002-of-00003.*not found.*\d+ tensors")


def test_truncated_shard(base: Path, tmp_path: Path, target: Path) -> None:
    model = edited(base, tmp_path / "m", shards=3)
    shard = model / "model-00003-of-00003.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    match = rf"model-00003-of-00003.*{size - 100} bytes, expected {size} .*truncated"
    refuse(model, make_plan(base, FOUR), target, match)


@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 64, b"\x04" + b"\0" * 7 + b"{]  "])
def test_corrupt_header(content: bytes, base: Path, tmp_path: Path, target: Path) -> None:
    model = edited(base, tmp_path / "m")
    (model / "model.safetensors").write_bytes(content)
    refuse(model, make_plan(base, FOUR), target, r"model\.safetensors.*header")


def test_weights_in_another_format(base: Path, tmp_path: Path, target: Path) -> None:
    model = edited(base, tmp_path / "m")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refuse(model, make_plan(base, FOUR), target, "found no weights, expected model.safetensors")


def test_missing_expert_tensor(base: Path, tmp_path: Path, target: Path) -> None:
    def drop(held: dict[str, torch.Tensor]) -> None:
        del held[EXPERT]

    model = edited(base, tmp_path / "m", drop)
    refuse(model, make_plan(base, FOUR), target, rf"{EXPERT}: not found in layer 1")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.half(), r"found F16 \[64, 48\], expected F32 \[64, 48\] like expert 0"),
        (lambda x: x[:, :40].clone(), r"shape is \[64, 40\], expected \[64, 48\]"),
    ],
    ids=["dtype", "shape"],
)
def test_expert_unlike_the_others(
    change: Callable[[torch.Tensor], torch.Tensor],
    match: str,
    base: Path,
    tmp_path: Path,
    target: Path,
) -> None:
    model = edited(base, tmp_path / "m", lambda held: {**held, EXPERT: change(held[EXPERT])})
    refuse(model, make_plan(base, FOUR), target, f"{EXPERT}: {match}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merging_what_is_not_finite(value: float, base: Path, tmp_path: Path, target: Path) -> None:
    def poison(held: dict[str, torch.Tensor]) -> None:
        held[EXPERT][7, 3] = value

    model = edited(base, tmp_path / "m", poison)
    refuse(model, merge_plan(base, 4, kept=FOUR[0]), target, f"{EXPERT}: found NaN or infinity")


def test_merging_beyond_the_range_of_float16(
    tiny_model: TinyModel, tmp_path: Path, target: Path
) -> None:
    base = tiny_model("mixtral", dtype="float16")

    def enlarge(held: dict[str, torch.Tensor]) -> None:
        for i in range(8):
            held[EXPERT.replace(".5.", f".{i}.")][0, 0] = 60000 * (-1) ** i

    model = edited(base, tmp_path / "m", enlarge)
    plan = merge_plan(base, 4, kept=FOUR[0])
    refuse(model, plan, target, "w2.weight and others: merged values reach .* 65504", PlanError)


def test_a_plan_for_another_model(base: Path, tiny_model: TinyModel, target: Path) -> None:
    plan = identity_plan(tiny_model("olmoe"))
    refuse(base, plan, target, "made for 'olmoe', the model is 'mixtral'", PlanError)


def test_disk_known_to_be_too_small(
    base: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(base)._replace(free=1000)
    monkeypatch.setattr(apply.shutil, "disk_usage", lambda _: usage)
    refuse(base, make_plan(base, FOUR), target, r"out: [\d,]+ bytes to write, found 1,000 free")


@pytest.mark.parametrize("call", ["copy_file_range", "pwrite"])
@pytest.mark.parametrize("shards", [1, 3])
def test_disk_that_fills_up(
    call: str,
    shards: int,
    base: Path,
    tmp_path: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = edited(base, tmp_path / "m", shards=shards)
    original: Callable[..., int] = getattr(os, call)
    left = [20]

    def fill(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    monkeypatch.setattr(shard_writer.os, call, fill)
    plan = make_plan(base, FOUR) if call == "copy_file_range" else merge_plan(base, 4, kept=FOUR[0])
    refuse(model, plan, target, "out: not written: .*No space left on device")


def test_disk_that_fills_up_under_the_small_files(
    base: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(apply.shutil, "copyfile", fill)
    refuse(base, make_plan(base, FOUR), target, "out: not written: .*No space left on device")


def test_interrupt_leaves_nothing(base: Path, target: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_plan(base, make_plan(base, FOUR), target, progress=interrupt)


def test_output_that_exists(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out: exists already"):
        apply_plan(base, make_plan(base, FOUR), tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_links_of_a_hub_snapshot_become_files(base: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in base.iterdir():
        shutil.copy(file, repository / "blobs" / f"sum-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"sum-{file.name}")
    apply_plan(snapshot, make_plan(base, FOUR), tmp_path / "out")
    for name in ("tokenizer.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "out" / name).is_file()
        assert not (tmp_path / "out" / name).is_symlink()
    block = json.loads((tmp_path / "out/config.json").read_text())["liveprune"]
    assert block["base_model"] == "org/base"  # As the plan says.


def test_links_that_lead_out_are_refused(base: Path, tmp_path: Path, target: Path) -> None:
    model = edited(base, tmp_path / "m")
    (tmp_path / "secret.json").write_text("{}")
    (model / "notes.json").symlink_to(tmp_path / "secret.json")
    refuse(model, make_plan(base, FOUR), target, "notes.json: links to .*secret.json")


def test_code_and_other_weights_stay_behind(base: Path, tmp_path: Path) -> None:
    model = edited(base, tmp_path / "m")
    for name in ("modeling.py", "pytorch_model.bin", "model.gguf", ".gitattributes", "LICENSE"):
        (model / name).write_text(name)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tools.jinja").write_text("t")
    (model / "original").mkdir()
    (model / "original/consolidated.pth").write_text("w")
    apply_plan(model, make_plan(base, FOUR), tmp_path / "out")
    names = {x.name for x in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "tokenizer.json", "additional_chat_templates"} <= names
    assert not names & {"modeling.py", "pytorch_model.bin", "model.gguf", "original"}
    assert ".gitattributes" not in names
    assert (tmp_path / "out/additional_chat_templates/tools.jinja").read_text() == "t"
